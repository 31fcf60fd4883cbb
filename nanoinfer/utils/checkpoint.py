"""A checkpoint: safetensors files, their index, and whether what their headers say fits a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from nanoinfer.errors import ModelLoadError
from nanoinfer.utils.json_fields import Fields, read_json

INDEX = "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def find_tensors(path: Path, shapes: dict[str, tuple[int, ...]], optional: set[str]) -> dict[str, Stored]:
    """The tensors of the checkpoint in folder `path`, by name; reads headers only.

    shapes: the tensors a model takes; optional: those of them that need not be there. Raises ModelLoadError listing
    every tensor that is missing, left over, in two files, or of another shape or type.
    """
    weight_map = _weight_map(path)
    stored: dict[str, Stored] = {}
    problems: list[str] = []
    for file in sorted({path / name for name in weight_map.values()} or {path / "model.safetensors"}):
        for name, tensor in _read_header(file).items():
            if name in stored:
                problems.append(f"{name} is in {stored[name].file.name} and in {file.name}")
            stored[name] = tensor
    problems += _against_index(weight_map, stored) if weight_map else []
    refuse(path, problems + _against_model(shapes, optional, stored))
    return stored


def refuse(path: Path, problems: list[str]) -> None:
    """Raise ModelLoadError with the first ten problems, if there are any."""
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:10])
        raise ModelLoadError(f"{path}: the weights do not fit the model:{lines}{more}")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The file mapped into memory: tensors are views of it, so what reads a part of one touches that part alone."""
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(f"{file} is truncated or not safetensors: {error}") from error


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name to file name, from the index; empty where there is a single file, which comes first."""
    if (path / "model.safetensors").exists():
        return {}
    if not (path / INDEX).exists():
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in path.glob(pattern))
        found = ", ".join(others[:3]) or "no weights"
        raise ModelLoadError(f"{path} has {found}, expected model.safetensors or {INDEX}: no other format is read")
    index = Fields(path / INDEX, read_json(path / INDEX, max_bytes=2**26))
    section = index.section("weight_map")
    if section is None or not section.values:
        raise index.refuse("weight_map", "an object from tensor names to file names")
    for name, file in section.values.items():
        if not isinstance(file, str) or PurePath(file).name != file or not file.endswith(".safetensors"):
            raise section.refuse(name, "the name of a .safetensors file in the same folder")
    return section.values


def _read_header(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        raise ModelLoadError(f"{file} is {'not a regular file' if file.exists() else 'missing'}")
    with opened(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118, not a dict
        return {name: Stored(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _against_index(weight_map: dict[str, str], stored: dict[str, Stored]) -> list[str]:
    problems = [f"{name} is not in {weight_map[name]}, where {INDEX} has it" for name in weight_map.keys() - stored]
    for name, tensor in stored.items():
        if weight_map.get(name) != tensor.file.name:
            listed = f"in {weight_map[name]}" if name in weight_map else "nowhere"
            problems.append(f"{name} is in {tensor.file.name}, but {INDEX} has it {listed}")
    return sorted(problems)


def _against_model(shapes: dict[str, tuple[int, ...]], optional: set[str], stored: dict[str, Stored]) -> list[str]:
    problems = [f"{name} is missing" for name in shapes if name not in stored and name not in optional]
    for name, tensor in stored.items():
        if name not in shapes:
            # Old checkpoints store RoPE's frequencies, which follow from the config.
            problems += [] if name.endswith(".rotary_emb.inv_freq") else [f"{name} has no place in the model"]
            continue
        if tensor.shape != shapes[name]:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shapes[name])}")
        if tensor.dtype not in DTYPES:
            problems.append(f"{name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    return problems
