"""The hand-made bugs of mutants.txt: still bugs of this source, and all of them seen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import mutate, read_mutants

TESTS = Path(__file__).parent


def test_every_mutant_still_fits_the_source(tmp_path: Path) -> None:
    """What it replaces is there exactly once, and what comes out is Python: who changes the source changes it."""
    mutants = read_mutants((TESTS / "mutants.txt").read_text())
    assert len({mutant.name for mutant in mutants}) == len(mutants) > 80
    for number, mutant in enumerate(mutants):
        mutate(mutant, tmp_path / str(number))
        ast.parse((tmp_path / str(number) / "nanoinfer" / "engine" / mutant.file).read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_stateful_test_sees_every_mutant() -> None:
    """A test of invariants is worth what it catches."""
    subprocess.run([sys.executable, TESTS / "mutants.py"], check=True)
