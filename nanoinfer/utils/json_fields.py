"""JSON files of a model folder, read so that whatever is wrong is named."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoinfer.errors import ModelLoadError


def read_json(path: Path, max_bytes: int = 2**20) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelLoadError naming the file."""
    if not path.is_file():
        raise ModelLoadError(f"{path} is {'not a regular file' if path.exists() else 'missing'}")
    if (size := path.stat().st_size) > max_bytes:
        raise ModelLoadError(f"{path} has {size} bytes, expected at most {max_bytes}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ModelLoadError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object whose getters check what they return; null counts as absent, as it does for Hugging Face."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Fields":
        return cls(path, read_json(path))

    def refuse(self, name: str, expected: str) -> ModelLoadError:
        value = self.values.get(name)
        found = "nothing" if value is None else f"{value!r:.200}"
        return ModelLoadError(f"{self.path}: {name} is {found}, expected {expected}")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value: Any = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value: Any = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no range
            raise self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is not None and type(value) is not bool:
            raise self.refuse(name, "true or false")
        return default if value is None else value

    def section(self, name: str) -> "Fields | None":
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return None if value is None else Fields(self.path, value)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None
