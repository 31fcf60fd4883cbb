"""Several engines one after the other, each in a process of its own, then put together."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeVar

from nanoinfer.bench.engines import is_installed, last_json
from nanoinfer.bench.latency import Latency
from nanoinfer.bench.machine import Limits, measure_limits
from nanoinfer.bench.startup import Startup
from nanoinfer.bench.target import Target
from nanoinfer.bench.throughput import Throughput

Row = TypeVar("Row", Throughput, Latency, Startup)


@dataclass(frozen=True, slots=True)
class Measured(Generic[Row]):
    """What the engines did and what the machine can do."""

    rows: list[Row]
    limits: Limits
    skipped: list[str]  # not installed
    failed: list[str]


def measure_engines(
    engines: Sequence[str], target: Target, command: Sequence[str], row: type[Row], measure: Callable[[str], list[Row]]
) -> Measured[Row]:
    """`measure` each engine that is installed: a single one here, several each by `command` in its own process.

    So no engine meets what another one left in memory, and its peak of memory is its own. command: the script with its
    arguments; called with one engine, it must end its output with a JSON object that has `results`, the fields of
    `row`, and `machine`, those of Limits. Raises SystemExit where no engine could be measured.
    """
    names = [name for name in dict.fromkeys(engines) if is_installed(name)]
    skipped = [name for name in dict.fromkeys(engines) if name not in names]
    for name in skipped:
        print(f"{name} is not installed: skipped", file=sys.stderr)
    if len(names) == 1:
        rows = measure(names[0])
        return Measured(rows, measure_limits(target.device, target.torch_dtype()), skipped, [])
    reports = {name: _in_own_process(command, name) for name in names}
    done = [report for report in reports.values() if report]
    if not done:
        raise SystemExit("no engine could be measured")
    limits = reduce(Limits.best, (Limits(**report["machine"]) for report in done))
    rows = [row(**values) for report in done for values in report["results"]]
    return Measured(rows, limits, skipped, [name for name, report in reports.items() if not report])


def _in_own_process(command: Sequence[str], engine: str) -> dict[str, Any] | None:
    """The report for one engine; None where that failed."""
    replaced = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    replaced.add_argument("--engine", action="append")
    replaced.add_argument("--plot")
    rest = replaced.parse_known_args(command)[1]
    print(f"measuring {engine}", file=sys.stderr)
    child = subprocess.run([sys.executable, *rest, "--engine", engine], stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        print(f"{engine} failed, as said above", file=sys.stderr)
        return None
    report = last_json(child.stdout)
    print(f"{engine}: {report['results']}", file=sys.stderr)  # the table comes last, and an engine may take an hour
    return report
