"""Does the stateful test see a bug? Puts those of mutants.txt into the scheduling core, one at a time, and looks.

    python tests/mutants.py [--examples N] [--random] [name ...]

The stateful test must fail on a copy of the package with the mutant in it, within the number of runs that CI makes;
it must pass on those that are listed as harmless, which change speed alone. Prints a line for each; exits with 1
where one is not as listed, or where what a mutant replaces is not in the source exactly once: the list cannot rot.
"""

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import hypothesis.stateful  # noqa: F401  imported before the workers fork: each imports nanoinfer anew, and only that
import pytest  # noqa: F401
import torch

ROOT = Path(__file__).parent.parent
SECONDS_PER_MUTANT = 600  # one that loops for ever is seen as well


class Mutant(NamedTuple):
    name: str
    file: str  # in nanoinfer/engine/
    edits: list[tuple[str, str]]  # old lines, new lines
    harmless: bool


def read_mutants(text: str) -> list[Mutant]:
    """Paragraphs of a line "file: name", then lines to take out (-) and to put in their place (+)."""
    deadly, harmless = text.split("# Harmless")
    return [
        parse(paragraph.splitlines(), part is harmless)
        for part in (deadly, harmless)
        for paragraph in part.split("\n\n")
        if paragraph.strip() and "\n-" in paragraph
    ]


def parse(lines: list[str], harmless: bool) -> Mutant:
    file, name = lines[0].split(": ", 1)
    hunks = [
        (sign, "".join(line[1:] + "\n" for line in part)) for sign, part in groupby(lines[1:], lambda line: line[0])
    ]
    edits = list[tuple[str, str]]()
    for sign, hunk in hunks:
        edits = [*edits, (hunk, "")] if sign == "-" else [*edits[:-1], (edits[-1][0], hunk)]
    return Mutant(name, file, edits, harmless)


def mutate(mutant: Mutant, folder: Path) -> None:
    """A copy of the package in folder, with the mutant's edits."""
    shutil.copytree(ROOT / "nanoinfer", folder / "nanoinfer", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    path = folder / "nanoinfer" / "engine" / mutant.file
    text = path.read_text()
    for old, new in mutant.edits:
        if ("\n" + text).count("\n" + old) != 1:
            raise ValueError(f"{mutant.name}: not exactly once in {mutant.file}:\n{old}")
        text = ("\n" + text).replace("\n" + old, "\n" + new)[1:]
    path.write_text(text)


def run_stateful_test(folder: str, examples: int, random: bool) -> str:
    """In a process of its own: how the test failed on the package in folder, and after how many runs; "" if not."""
    sys.path[:0] = [folder, str(ROOT / "tests")]
    torch.set_num_threads(1)
    import test_scheduler_stateful as test

    import nanoinfer

    assert nanoinfer.__file__.startswith(folder)
    runs = 0

    class Counted(test.Engine):
        def __init__(self) -> None:
            nonlocal runs
            runs += 1
            super().__init__()

    try:
        test.run(Counted, examples or test.EXAMPLES, random=random, shrink=False)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = (str(error).splitlines() or [""])[0][:60]
        return f"{runs} runs: {type(error).__name__} in {where.name}, line {where.lineno} {reason}"
    return ""


def check(mutant: Mutant, examples: int, random: bool) -> bool:
    """Try one mutant and print what became of it; whether that is what is listed."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("fork").Pool(1) as pool:
        mutate(mutant, Path(folder))
        try:
            death = pool.apply_async(run_stateful_test, (folder, examples, random)).get(SECONDS_PER_MUTANT)
        except multiprocessing.TimeoutError:
            death = "it hangs"
    as_listed = mutant.harmless == (death == "")
    seconds = time.perf_counter() - began
    print(f"{'ok' if as_listed else 'WRONG':5} {seconds:5.1f} s  {mutant.name}: {death or 'lives'}", flush=True)
    return as_listed


def main() -> None:
    parser = argparse.ArgumentParser(description="Check that the stateful test sees hand-made bugs.")
    parser.add_argument("names", nargs="*", help="mutants to try; all if none is given")
    parser.add_argument("--examples", type=int, default=0, help="runs of the test; 0: as many as in CI")
    parser.add_argument("--random", action="store_true", help="new runs instead of those that CI makes")
    options = parser.parse_args()
    mutants = read_mutants((Path(__file__).parent / "mutants.txt").read_text())
    chosen = [mutant for mutant in mutants if not options.names or mutant.name in options.names]
    if unknown := set(options.names) - {mutant.name for mutant in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    wrong = sum(not check(mutant, options.examples, options.random) for mutant in chosen)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
