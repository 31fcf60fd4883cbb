"""The README's word on sampling: its examples run, and its tables name every option with the default it has."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from nanoinfer import SamplingParams
from nanoinfer.engine_config import EngineConfig

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("### What a request may ask for")[1].split("\n### ")[0]


def test_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as they stand; each but the first shows something."""
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    blocks = re.findall("```python\n(.*?)```", SECTION, re.DOTALL)
    assert len(blocks) == 6
    try:
        for i, block in enumerate(blocks):
            exec(compile(block, f"README.md, example {i}", "exec"), names)
            assert (capsys.readouterr().out != "") == (i > 0)
    finally:
        names["llm"].close()


def test_every_engine_option_is_listed() -> None:
    """By its name, where the section says what LLM takes."""
    listed = (ROOT / "README.md").read_text().split("The options of `LLM(model, ...)`")[1].split(";")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {field.name for field in fields(EngineConfig)} - {"model"}


def rows() -> Iterator[tuple[str, str]]:
    """Each option that a table names, and the default that stands beside it."""
    for options, default in re.findall(r"^\| (`.*?) \| (.*?) \|", SECTION, re.MULTILINE):
        yield from ((option, default) for option in re.findall(r"`(\w+)`", options))


def test_every_option_is_described() -> None:
    """Once, with the default of a SamplingParams that nobody has told anything."""
    described = list(rows())
    own = {field.name: getattr(field.default, "name", repr(field.default)) for field in fields(SamplingParams)}
    assert dict(described) == own and len(described) == len(own)
