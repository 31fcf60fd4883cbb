"""A model's folder, from its path or its name on the Hugging Face Hub."""

from pathlib import Path

from nanoinfer.errors import ModelLoadError

CONFIG_FILES = ["*.json", "*.txt", "*.jinja"]
WEIGHT_FILES = ["*.safetensors"]


def resolve_model(
    name_or_path: str | Path, revision: str | None = None, *, cache_dir: Path | None = None, weights: bool = True
) -> Path:
    """A local folder as it is; else the folder of that name and revision in the hub's cache, downloaded as needed.

    Only safetensors (none with weights=False), JSON, text and chat templates are fetched. HF_HUB_OFFLINE=1 uses the
    cache alone. Raises ModelLoadError where the name is neither.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{path} is a file, expected a model folder")
    if path.is_absolute() or str(name_or_path).startswith((".", "~")) or len(path.parts) > 2:
        raise ModelLoadError(f"there is no folder {path}")
    patterns = CONFIG_FILES + WEIGHT_FILES if weights else CONFIG_FILES
    return _download(str(name_or_path), revision, cache_dir, patterns)


def _download(name: str, revision: str | None, cache_dir: Path | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # takes half a second to import, which a local folder need not wait

    try:
        found = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except Exception as error:  # the hub's errors have no common class, and differ between its versions
        at = f" at revision {revision!r}" if revision else ""
        raise ModelLoadError(
            f"there is no folder {name!r}, and the Hugging Face Hub did not give a model of that name{at}: {error}"
        ) from error
    return Path(found)
