"""What is installed, which kernels run where, and whether each computes what it should: `python -m nanoinfer check`."""

import importlib
import importlib.metadata
import platform
from collections.abc import Callable

import torch
from torch import Tensor

import nanoinfer
from nanoinfer import ops, reference
from nanoinfer.row_state import (
    FLAG_SAMPLE,
    FLAG_STORE,
    FREQUENCY_PENALTY,
    LENGTH,
    PRESENCE_PENALTY,
    PROMPT_LENGTH,
    REPETITION_PENALTY,
    ROW_STATE_WIDTH,
    TEMPERATURE,
    TOP_P,
)

Arguments = dict[str, Tensor | float | int | bool | None]

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FLOAT32_OPS = {"prepare_batch", "penalize", "sample", "tell_logprobs"}  # the others take every dtype
FLOAT32_TENSORS = {"row_state", "cos_sin"}  # float32, or bits of it, beside any dtype


def main() -> int:
    """Print the report; 0 where every op agrees with its definition, 1 otherwise."""
    for line in [*versions(), ""]:
        print(line)
    torch.manual_seed(0)
    failures: list[str] = []
    print(f"{'op':<18} {'kernel on cpu':<26} kernel on cuda")
    for name in ops.SCHEMAS:
        print(f"{name:<18} {self_test(name, 'cpu', failures):<26} {self_test(name, 'cuda', failures)}".rstrip())
    print(*failures, sep="\n")
    return 1 if failures else 0


def self_test(name: str, device: str, failures: list[str]) -> str:
    """One cell of the table; what went wrong is appended to failures."""
    if (name, device.upper()) not in ops.COMPILED:
        return "none: plain torch" if name in ops.missing_kernels(device.upper()) else "none needed"
    if device == "cuda" and not torch.cuda.is_available():
        return "built, no device"
    dtypes = (torch.float32,) if name in FLOAT32_OPS else (torch.float32, torch.bfloat16, torch.float16)
    found = {SHORT[dtype]: mismatch(name, device, dtype) for dtype in dtypes}
    wrong = {dtype: what for dtype, what in found.items() if what}
    failures += [f"{name} on {device} in {dtype}: {what}" for dtype, what in wrong.items()]
    return f"WRONG in {' '.join(wrong)}" if wrong else f"ok: {' '.join(found)}"


def versions() -> list[str]:
    """Lines that say what runs here."""
    installed = {"nanoinfer": nanoinfer.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "tokenizers", "safetensors"):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        "   ".join(f"{name} {version}" for name, version in installed.items()),
        f"CPU: {platform.machine()}, {torch.get_num_threads()} threads, {cpu_kernels()}",
        f"CUDA: {', '.join(gpus) or 'no device'} (torch is built for CUDA {torch.version.cuda or 'none'})",
    ]


def cpu_kernels() -> str:
    """Which build of the CPU kernels is in use."""
    try:
        extension = importlib.import_module("nanoinfer._C")
    except (ImportError, OSError) as error:
        return f"no kernels: {error}"
    return f"kernels for {extension.cpu_isa()} (NANOINFER_CPU_ISA chooses among {', '.join(extension.cpu_isas())})"


def mismatch(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Where an op differs from its definition on a small example, or None; what it writes in place counts."""
    example = EXAMPLES[name]()
    got, expected = ({k: _copy(k, v, device, dtype) for k, v in example.items()} for _ in range(2))
    # Sums of a few dozen products of about 1: in float32 their order shows, in half precision only the last rounding.
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)
    try:
        result, truth = getattr(ops, name)(**got), getattr(reference, name)(**expected)
        for key, value in [*expected.items(), ("the result", truth)]:
            if isinstance(value, Tensor):
                actual = result if key == "the result" else got[key]
                torch.testing.assert_close(actual, value, msg=(key + ": {}").format, rtol=eps, atol=eps)
    except (AssertionError, RuntimeError) as error:
        return " ".join(str(error).split())
    return None


def _copy(
    key: str, value: Tensor | float | bool | None, device: str, dtype: torch.dtype
) -> Tensor | float | bool | None:
    if not isinstance(value, Tensor):
        return value
    cast = value.is_floating_point() and key not in FLOAT32_TENSORS
    return value.to(device, dtype if cast else value.dtype, copy=True)


def int32(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _rows(count: int, length: int) -> Tensor:
    """row_state of requests of one length that sample at temperature 1, and the last row."""
    state = torch.zeros(count + 1, ROW_STATE_WIDTH, dtype=torch.int32)
    state[:, LENGTH] = length
    floats = state.view(torch.float32)
    floats[:, TEMPERATURE] = floats[:, TOP_P] = floats[:, REPETITION_PENALTY] = 1.0
    return state


def _prepare_batch() -> Arguments:
    """A new row, an edit, a prompt's chunk of three tokens and a decoded one; one entry of padding everywhere."""
    sizes = {"tokens": 5, "positions": 5, "slots": 5, "q_starts": 4, "kv_lens": 3, "rows": 3}
    sizes |= {"logit_rows": 3, "sample_rows": 3}
    return {
        "header": int32(1, 1, 2, 4),
        "new_rows": torch.arange(1 + ROW_STATE_WIDTH, dtype=torch.int32).repeat(2, 1),
        "edits": int32([0, 0, 4], [9, 9, 9]),
        "chunks": int32([0, 0, 3, FLAG_STORE], [1, 5, 6, FLAG_STORE | FLAG_SAMPLE], [9, 9, 9, 9]),
        "new_tokens": int32(7, 8, 9, -1, 99),
        "row_state": _rows(3, length=5),
        "block_tables": int32([0, 0, 0], [2, 1, 3], [0, 0, 0], [0, 0, 0]),
        "slot_tokens": torch.zeros(20, dtype=torch.int32),
        **{name: torch.full((size,), -7, dtype=torch.int32) for name, size in sizes.items()},
        "block_size": 4,
    }


def _rotary(**tensors: Tensor) -> Arguments:
    return {**tensors, "positions": int32(0, 3, 7), "cos_sin": torch.randn(8, 16), "interleaved": False}


def _store(**tensors: Tensor) -> Arguments:
    kv = {"k": torch.randn(3, 2, 16), "v": torch.randn(3, 2, 16), "kv": torch.randn(4, 2, 2, 4, 16)}
    return {**tensors, **kv, "slots": int32(0, -1, 15)}


def _paged_attention() -> Arguments:
    """One sequence of 18 positions in blocks of 16, two of them queries; four query heads on two of K and V."""
    return {
        "q": torch.randn(2, 4, 32),
        "kv": torch.randn(3, 2, 2, 16, 32),
        "q_starts": int32(0, 2),
        "kv_lens": int32(18),
        "rows": int32(0),
        "block_tables": int32([2, 0], [0, 0]),
        "scale": 0.2,
        "window": 0,
        "tables_ready": False,
    }


def _penalize() -> Arguments:
    """Two rows of three ids: a prompt's one and two of output, which in the first row are the same."""
    row_state = _rows(2, length=3)
    row_state[:, PROMPT_LENGTH] = 1
    for column, penalty in ((REPETITION_PENALTY, 1.5), (PRESENCE_PENALTY, -0.5), (FREQUENCY_PENALTY, 0.3)):
        row_state.view(torch.float32)[:, column] = penalty
    return {
        "logits": torch.randn(2, 50),
        "sample_rows": int32(1, 0),
        "row_state": row_state,
        "block_tables": int32([0], [1], [0]),
        "slot_tokens": int32(0, 1, 1, 9, 4, 4, 6, 9),
        "block_size": 4,
    }


def _norm(**tensors: Tensor) -> Arguments:
    return {"x": torch.randn(3, 70), **tensors, "weight": torch.randn(70), "eps": 1e-6}


# For each op its arguments by name, small and valid; made anew by each call.
EXAMPLES: dict[str, Callable[[], Arguments]] = {
    "prepare_batch": _prepare_batch,
    "rms_norm": _norm,
    "add_rms_norm": lambda: _norm(residual=torch.randn(3, 70)),
    "silu_and_mul": lambda: {"x": torch.randn(3, 70)},
    "rotary": lambda: _rotary(x=torch.randn(3, 2, 16)),
    "store_kv": _store,
    "rotary_store_kv": lambda: _store(q=torch.randn(3, 4, 16)) | _rotary(),
    "paged_attention": _paged_attention,
    "thin_linear": lambda: {
        "x": torch.randn(3, 32),
        "weight": torch.randn(8, 32),
        "bias": torch.randn(8),
        "float_out": False,
    },
    "thin_gated_linear": lambda: {
        "x": torch.randn(3, 64),
        "weight": torch.randn(24, 64) / 8,  # sums of about 1, as the tolerance expects
    },
    "thin_qkv": lambda: {
        "x": torch.randn(3, 64),
        "weight": torch.randn(128, 64) / 8,
        "bias": torch.randn(128),
        "kv": torch.randn(4, 2, 2, 4, 16),
        "positions": int32(0, 3, 7),
        "slots": int32(0, -1, 15),
        "cos_sin": torch.randn(8, 16),
    },
    "tile_linear": lambda: {
        "x": torch.randn(20, 64),
        "weight": torch.randn(48, 64) / 8,
        "bias": torch.randn(48),
        "gated": False,
        "cols": 40,
        "tiles": 1,
        "split": 1,
        "blocks": 1,
    },
    "tall_gated_linear": lambda: {
        "x": torch.randn(20, 64),
        "weight": torch.randn(48, 64) / 8,
        "cols": 128,
        "down": 1,
        "across": 1,
        "band": 1,
    },
    "penalize": _penalize,
    "sample": lambda: {
        "logits": torch.randn(2, 50),
        "sample_rows": int32(1, 0),
        "row_state": _rows(2, length=3),
        "tokens": int32(0, 0),
        "vocab_size": 50,
    },
    "tell_logprobs": lambda: {
        "logits": torch.randn(3, 50),
        "rows": int32(2, 0),
        "tokens": int32(7, 40),
        "vocab_size": 47,
        "count": 5,
    },
}
