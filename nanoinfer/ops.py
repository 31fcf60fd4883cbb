"""The engine's ops: one schema each, one typed wrapper each; the dispatcher picks the kernel.

This file owns the schemas. `_C` (csrc/) only implements them for CPU and CUDA; where it lacks an op for a device,
the plain-torch version in `reference.py` takes its place, so the package runs, slowly, without any kernel.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoinfer import reference
from nanoinfer.tiles import THIN_UP_TO, GatedTiles, Tiles, gated_tiles, measured_tall, measured_tiles

logger = logging.getLogger("nanoinfer")

SCHEMAS = {
    "prepare_batch": "(Tensor header, Tensor new_rows, Tensor edits, Tensor chunks, Tensor new_tokens, "
    "Tensor(a!) row_state, Tensor(b!) block_tables, Tensor(c!) slot_tokens, Tensor(d!) tokens, Tensor(e!) positions, "
    "Tensor(f!) slots, Tensor(g!) q_starts, Tensor(h!) kv_lens, Tensor(i!) rows, Tensor(j!) logit_rows, "
    "Tensor(k!) sample_rows, int block_size) -> ()",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    "silu_and_mul": "(Tensor x) -> Tensor",
    "rotary": "(Tensor(a!) x, Tensor positions, Tensor cos_sin, bool interleaved) -> ()",
    "store_kv": "(Tensor k, Tensor v, Tensor(a!) kv, Tensor slots) -> ()",
    "rotary_store_kv": "(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!) kv, Tensor positions, Tensor slots, "
    "Tensor cos_sin, bool interleaved) -> ()",
    "paged_attention": "(Tensor q, Tensor kv, Tensor q_starts, Tensor kv_lens, Tensor rows, Tensor block_tables, "
    "float scale, int window, bool tables_ready=False) -> Tensor",
    "thin_linear": "(Tensor x, Tensor weight, Tensor? bias, bool float_out) -> Tensor",
    "thin_gated_linear": "(Tensor x, Tensor weight) -> Tensor",
    "thin_qkv": "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) kv, Tensor positions, Tensor slots, "
    "Tensor cos_sin) -> Tensor",
    "tile_linear": "(Tensor x, Tensor weight, Tensor? bias, bool gated, int cols, int tiles, int split, int blocks) "
    "-> Tensor",
    "tall_gated_linear": "(Tensor x, Tensor weight, int cols, int down, int across, int band) -> Tensor",
    "penalize": "(Tensor(a!) logits, Tensor sample_rows, Tensor row_state, Tensor block_tables, Tensor slot_tokens, "
    "int block_size) -> ()",
    "sample": "(Tensor logits, Tensor sample_rows, Tensor(a!) row_state, Tensor(b!) tokens, int vocab_size) -> ()",
    "tell_logprobs": "(Tensor logits, Tensor? rows, Tensor tokens, int vocab_size, int count) -> Tensor",
}

# Shapes and dtypes of results, for tracing; an op that is not here returns nothing.
FAKES: dict[str, Callable[..., Tensor]] = {
    "rms_norm": lambda x, weight, eps: x.new_empty(x.shape),
    "add_rms_norm": lambda x, residual, weight, eps: x.new_empty(x.shape),
    "silu_and_mul": lambda x: x.new_empty((x.shape[0], x.shape[1] // 2)),
    "paged_attention": lambda q, *rest: q.new_empty(q.shape),
    "thin_linear": lambda x, weight, bias, float_out: x.new_empty(
        (x.shape[0], weight.shape[0]), dtype=torch.float32 if float_out else x.dtype
    ),
    "thin_gated_linear": lambda x, weight: x.new_empty((x.shape[0], weight.shape[0] // 2)),
    "thin_qkv": lambda x, weight, bias, kv, *rest: x.new_empty(
        (x.shape[0], weight.shape[0] // kv.shape[4] - 2 * kv.shape[2], kv.shape[4])
    ),
    "tile_linear": lambda x, weight, bias, gated, *plan: x.new_empty((x.shape[0], weight.shape[0] // (1 + gated))),
    "tall_gated_linear": lambda x, weight, *cut: x.new_empty((x.shape[0], weight.shape[0] // 2)),
    "tell_logprobs": lambda logits, rows, tokens, vocab_size, count: tokens.new_empty((len(tokens), 3 + 2 * count)),
}

# Most rows that `thin_linear`, `thin_gated_linear` and `thin_qkv` take. On two AVX-512 cores a 4864 x 896 bf16 layer
# takes 234, 357 and 668 us for 1, 8 and 16 rows, torch's linear 535, 520 and 543. Sixteen all the same: what it
# computes for a row does not depend on how many run beside it, which the library does not promise. (On some GPUs that
# ends at 4 or 8 rows: see THIN_UP_TO.)
THIN_ROWS = 16
TALL_ROWS = 256  # `tall_gated_linear` is for more, and for some fewer: see tiles.py
FEW = 32  # most ids for which `tell_logprobs` has a kernel
FLOAT_PRODUCT_DEVICES = ("cuda",)  # where the library's product of halves can leave its float32 sums unrounded
HALVES = (torch.bfloat16, torch.float16)


def _load_extension() -> str | None:
    """Load the compiled kernels; why they are missing, or None."""
    if importlib.util.find_spec("nanoinfer._C") is None:
        return "the extension is not built (pip install -e . with a C++ compiler builds it)"
    try:
        importlib.import_module("nanoinfer._C")
    except (ImportError, OSError) as error:
        return f"the extension does not load: {error}"
    return None


def has_kernel(name: str, device: str) -> bool:
    """Whether something implements op `name` for `device`, "CPU" or "CUDA"."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"nanoinfer::{name}", device))


def _register() -> tuple[torch.library.Library, frozenset[tuple[str, str]]]:
    """Define every op, load the kernels, fill the gaps; the library and the (op, device) pairs that have a kernel."""
    library = torch.library.Library("nanoinfer", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_fake(f"nanoinfer::{name}", FAKES.get(name, lambda *args: None), lib=library)
    library.define("has_tiles(Tensor on) -> bool")  # a question, not an op: answered where it is asked, or by no
    if missing := _load_extension():
        logger.warning("nanoinfer runs on plain torch, slowly: %s", missing)
    pairs = [(name, device) for name in SCHEMAS for device in ("CPU", "CUDA")]
    compiled = frozenset(pair for pair in pairs if has_kernel(*pair))
    for name, device in set(pairs) - compiled:
        library.impl(name, getattr(reference, name), device)
    for device in ("CPU", "CUDA"):
        if not has_kernel("has_tiles", device):
            library.impl("has_tiles", lambda on: False, device)
    return library, compiled


_library, COMPILED = _register()
_ops = torch.ops.nanoinfer


def missing_kernels(device: str) -> list[str]:
    """Ops that run on plain torch where `device`, "CPU" or "CUDA", calls them, and would do better."""
    # Four are for GPUs; the fifth is a few passes over memory, whose work torch shares out well.
    for_gpus = {"thin_gated_linear", "thin_qkv", "tile_linear", "tall_gated_linear"}
    unused = {"CPU": for_gpus | {"tell_logprobs"}}.get(device, set())
    return sorted(name for name in SCHEMAS if (name, device) not in COMPILED and name not in unused)


def prepare_batch(
    header: Tensor, new_rows: Tensor, edits: Tensor, chunks: Tensor, new_tokens: Tensor,
    row_state: Tensor, block_tables: Tensor, slot_tokens: Tensor,
    tokens: Tensor, positions: Tensor, slots: Tensor, q_starts: Tensor, kv_lens: Tensor, rows: Tensor,
    logit_rows: Tensor, sample_rows: Tensor, block_size: int,
) -> None:  # fmt: skip
    """Apply one step's message to the table of requests, then write the step's Batch. Everything is int32.

    The message: header [4] counts its entries: new rows, edits, chunks, tokens; entries past a count are ignored.
    new_rows [N, 1 + ROW_STATE_WIDTH] is (row, its initial state); edits [E, 3] is (row, index, block); chunks [C, 4]
    is (row, start, end, flags), see `row_state.py`; new_tokens [M] holds the chunks' token ids one chunk after the
    other, -1 for the row's last token.

    The table, edited in place: row_state [rows, ROW_STATE_WIDTH], block_tables [rows, blocks per sequence],
    slot_tokens [slots] (the token whose K and V a slot holds). The last row belongs to no request.

    The rest is the Batch's fields (see `batch.py`), written whole: entries past the step's counts become padding.
    Raises RuntimeError where a count, row, index, block, position or flag is out of range, before anything is written.
    """
    _ops.prepare_batch(
        header, new_rows, edits, chunks, new_tokens, row_state, block_tables, slot_tokens,
        tokens, positions, slots, q_starts, kv_lens, rows, logit_rows, sample_rows, block_size,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019). x [T, D], weight [D].

    When it reads weight, see `thin_linear`.
    """
    return _ops.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then `rms_norm` of the sum as stored. x, residual [T, D], weight [D]."""
    return _ops.add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer, 2020). x [T, 2 I], the gates first -> [T, I]."""
    return _ops.silu_and_mul(x)  # type: ignore[no-any-return]


def rotary(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None:
    """Rotate x [T, H, D] in place by the angles of its positions (RoFormer, Su et al., 2021).

    positions [T] int32; cos_sin [P, R] float32, R <= D: cosines in the first half of a row, sines in the second.
    Element i is paired with i + R / 2 (Qwen2, Llama), or 2 i with 2 i + 1 where interleaved (GPT-J).
    """
    _ops.rotary(x, positions, cos_sin, interleaved)


def store_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Write k, v [T, Hkv, D] to the slots [T] (int32, -1: skip) of kv [blocks, 2, Hkv, block_size, D]."""
    _ops.store_kv(k, v, kv, slots)


def rotary_store_kv(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor,
    interleaved: bool = False,
) -> None:  # fmt: skip
    """`rotary` on q [T, Hq, D] in place and on k, then `store_kv` of the rotated k and of v; k itself stays."""
    _ops.rotary_store_kv(q, k, v, kv, positions, slots, cos_sin, interleaved)


def paged_attention(
    q: Tensor, kv: Tensor, q_starts: Tensor, kv_lens: Tensor, rows: Tensor, block_tables: Tensor,
    scale: float, window: int = 0, tables_ready: bool = False,
) -> Tensor:  # fmt: skip
    """Causal attention of every chunk of a step to its sequence's paged K and V; any mix of chunk lengths.

    q [T, Hq, D]; kv [blocks, 2, Hkv, block_size, D]; the rest as in Batch. Query i of chunk r stands at position
    kv_lens[r] - (chunk length) + i and sees keys up to its own, its own included, and of these only the last
    `window` where window > 0. Returns [T, Hq, D]; tokens that belong to no chunk are left unwritten.

    tables_ready, which matters on CUDA alone, is the caller's word that whatever wrote q_starts, kv_lens, rows and
    block_tables had ended before the kernel ahead of this op in the stream began: they are then read, and the work
    shared out, while that kernel still runs. Where it is not so, results are wrong now and then.
    """
    return _ops.paged_attention(  # type: ignore[no-any-return]
        q, kv, q_starts, kv_lens, rows, block_tables, scale, window, tables_ready
    )


def thin_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, float_out: bool = False) -> Tensor:
    """x @ weight.T + bias with float32 sums, for few rows. x [M, K], M <= THIN_ROWS; weight [N, K]; bias [N].

    Returns [M, N] of x's dtype, or float32 where float_out. It may read weight and bias before the stream's earlier
    kernels have ended: none of this package's own may have written them since the last foreign one.
    """
    return _ops.thin_linear(x, weight, bias, float_out)  # type: ignore[no-any-return]


def thin_gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu_and_mul(thin_linear(x, weight)), bit for bit. x [M, K], M <= THIN_ROWS; weight [2 N, K], gates first.

    When it reads weight, see `thin_linear`.
    """
    return _ops.thin_gated_linear(x, weight)  # type: ignore[no-any-return]


def thin_qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, kv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor
) -> Tensor:
    """`thin_linear` to heads of queries, keys and values, then `rotary_store_kv` of these, bit for bit; the queries.

    x [M, K], M <= THIN_ROWS; weight [(Hq + 2 Hkv) D, K], bias [(Hq + 2 Hkv) D]; the rest as there, with cos_sin [P, D]:
    all of a head is rotated. Returns [M, Hq, D]. When it reads weight and bias, see `thin_linear`.
    """
    return _ops.thin_qkv(x, weight, bias, kv, positions, slots, cos_sin)  # type: ignore[no-any-return]


def tile_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, cols: int, tiles: int, split: int, blocks: int
) -> Tensor:
    """x @ weight.T + bias with float32 sums. x [M, K], weight [N, K], bias [N] -> [M, N] of x's dtype.

    gated: the first half of weight's rows are gates, and the result is silu(gate) * up [M, N / 2]; there is no bias.
    The rest says how a GPU cuts the work, see `Tiles`. When it reads weight, see `thin_linear`.
    """
    return _ops.tile_linear(x, weight, bias, gated, cols, tiles, split, blocks)  # type: ignore[no-any-return]


def tall_gated_linear(x: Tensor, weight: Tensor, cols: int, down: int, across: int, band: int) -> Tensor:
    """silu(gate) * up of the rounded x @ weight.T, for many rows. x [M, K], weight [2 N, K], gates first -> [M, N].

    The rest says how a GPU cuts the work, see `GatedTiles`. A row's result depends on that row and weight alone.
    """
    return _ops.tall_gated_linear(x, weight, cols, down, across, band)  # type: ignore[no-any-return]


@cache
def _has_tiles(device: torch.device) -> bool:
    """Whether those two have kernels of their own there, and do not take `thin_linear`'s, 16 rows at a time."""
    return bool(_ops.has_tiles(torch.empty(0, device=device)))


def best_tiles(x: Tensor, weight: Tensor, gated: bool = False) -> Tiles | None:
    """What `tile_linear` does best with for x and weight; None where the library is faster, or nobody measured."""
    if x.dtype not in HALVES or not _has_tiles(x.device):
        return None
    outputs, inputs = weight.shape
    return measured_tiles(outputs, inputs, gated, x.shape[0])


def tall_tiles(x: Tensor, weight: Tensor) -> GatedTiles | None:
    """What `tall_gated_linear` does best with for x and weight; None where it is not for them, or has no kernel."""
    outputs, inputs = weight.shape
    fits = x.dtype in HALVES and outputs % 16 == 0 and inputs % 8 == 0
    if not fits or not _has_tiles(x.device):
        return None
    rows = x.shape[0]
    return gated_tiles(outputs // 2, rows) if rows > TALL_ROWS else measured_tall(outputs, inputs, rows)


def takes_thin(op: str, x: Tensor, weight: Tensor, float_out: bool = False) -> bool:
    """Whether x has so few rows that `op`, one of the thin ones, is for it and weight, and there is a kernel.

    float_out: sums are wanted unrounded, which of the kernels for more rows none gives.
    """
    if x.shape[0] > THIN_ROWS or x.dtype not in HALVES or (op, x.device.type.upper()) not in COMPILED:
        return False
    outputs, inputs = weight.shape
    most = THIN_UP_TO.get((outputs, inputs, op == "thin_gated_linear"), THIN_ROWS)
    return x.shape[0] <= most or float_out or not _has_tiles(x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, float_out: bool = False) -> Tensor:
    """`thin_linear` or `tile_linear` where faster, the library's matrix product elsewhere. x [M, K] -> [M, N]."""
    if takes_thin("thin_linear", x, weight, float_out):
        return thin_linear(x, weight, bias, float_out)
    if not float_out and (tiles := best_tiles(x, weight)):
        return tile_linear(x, weight, bias, False, *tiles)
    if float_out and bias is None and x.dtype != torch.float32 and x.device.type in FLOAT_PRODUCT_DEVICES:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    out = F.linear(x, weight, bias)
    return out.float() if float_out else out


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu_and_mul(linear(x, weight)), as one kernel where that is faster. x [M, K], weight [2 N, K] -> [M, N]."""
    if takes_thin("thin_gated_linear", x, weight):
        return thin_gated_linear(x, weight)
    if tiles := best_tiles(x, weight, gated=True):
        return tile_linear(x, weight, None, True, *tiles)
    if cut := tall_tiles(x, weight):
        return tall_gated_linear(x, weight, *cut)
    return silu_and_mul(linear(x, weight))


def qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, kv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor
) -> Tensor:
    """Queries [T, Hq, D], rotated, of x [T, K]; its keys and values, likewise, go to kv. As one kernel for few rows."""
    kv_heads, head_dim = kv.shape[2], kv.shape[4]
    if takes_thin("thin_qkv", x, weight) and cos_sin.shape[1] == head_dim:
        return thin_qkv(x, weight, bias, kv, positions, slots, cos_sin)
    heads: Tensor = linear(x, weight, bias).unflatten(1, (-1, head_dim))
    q, k, v = heads.tensor_split((heads.shape[1] - 2 * kv_heads, heads.shape[1] - kv_heads), dim=1)
    rotary_store_kv(q, k, v, kv, positions, slots, cos_sin)
    return q


def penalize(
    logits: Tensor, sample_rows: Tensor, row_state: Tensor, block_tables: Tensor, slot_tokens: Tensor, block_size: int
) -> None:
    """Make ids that a row already holds less likely, in place. logits [L, V] float32.

    The row's ids are the slot_tokens of its first LENGTH positions. First, once for each of them, a positive logit is
    divided by the row's REPETITION_PENALTY, another multiplied (CTRL, Keskar et al., 2019). Then an id of its output,
    which is what comes after the first PROMPT_LENGTH positions, loses FREQUENCY_PENALTY * (its count there) +
    PRESENCE_PENALTY, each operation rounded to float32: the result does not depend on the order of positions.
    Raises RuntimeError (on CUDA, leaves out) where a length, slot or id that is looked at is out of range.
    """
    _ops.penalize(logits, sample_rows, row_state, block_tables, slot_tokens, block_size)


def sample(logits: Tensor, sample_rows: Tensor, row_state: Tensor, tokens: Tensor, vocab_size: int) -> None:
    """Choose the next token of each row by its parameters in row_state, and make it the row's last token.

    logits [L, V] float32; sample_rows [L]; tokens [L] int32 is written: an id below vocab_size, or -1 for padding rows
    and where the logits are not finite (a NaN among them, or a largest one that is infinite). Temperature 0 takes the
    largest logit, the lowest id among equals. Otherwise probabilities of logits / temperature are cut by min_p, top_k
    and top_p in this order (equal logits stay or go together) and the id is where their running sum passes one
    uniform number, which depends on the row's seed and length alone. Adds 1 to the row's LENGTH.
    """
    _ops.sample(logits, sample_rows, row_state, tokens, vocab_size)


def tell_logprobs(logits: Tensor, rows: Tensor | None, tokens: Tensor, vocab_size: int, count: int) -> Tensor:
    """What there is to tell of the ids that stand at some places, and of the `count` likeliest there.

    logits [L, V] float32, of which ids below vocab_size count; rows [P] int32: each place's row of them, None: place
    i's is row i; tokens [P] int32, where -1 counts as 0. Returns [P, 3 + 2 count] int32: the token's rank, which is
    1 + how many ids have a larger logit; the token and its log probability, a float32 by its bits; then the ids with
    the largest logits and theirs, largest first, the lowest id first of equal ones. Where a logit is NaN or the largest
    is infinite, every log probability is NaN, and the ids are any.
    """
    if count > FEW:
        return reference.tell_logprobs(logits, rows, tokens, vocab_size, count)
    return _ops.tell_logprobs(logits, rows, tokens, vocab_size, count)  # type: ignore[no-any-return]
