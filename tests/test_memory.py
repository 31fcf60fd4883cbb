"""How much memory there is to take, by what Linux says."""

from pathlib import Path

from nanoinfer.utils.memory import UNLIMITED, _control_group_rest, available_host_memory


def write_group(root: Path, limit: str) -> Path:
    root.mkdir()
    (root / "memory.max").write_text(limit + "\n")
    (root / "memory.current").write_text("700\n")
    (root / "memory.stat").write_text("anon 200\nfile 500\ninactive_file 400\n")
    return root


def test_a_checkpoint_in_the_page_cache_counts_as_free(tmp_path: Path) -> None:
    """A container that has just read a model shows it as used, though it gives way."""
    assert _control_group_rest(write_group(tmp_path / "limited", "1000")) == 1000 - 700 + 400


def test_no_group_and_no_limit(tmp_path: Path) -> None:
    """Outside a container the machine's own memory is the limit."""
    assert _control_group_rest(tmp_path / "absent") == UNLIMITED
    assert _control_group_rest(write_group(tmp_path / "unlimited", "max")) == UNLIMITED
    assert 0 < available_host_memory() < UNLIMITED
