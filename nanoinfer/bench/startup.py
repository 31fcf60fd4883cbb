"""How long until the first token: a fresh process each time, from its start to the end of a request for one token.

This module is also that process: `python -m nanoinfer.bench.startup` with what to start as JSON. It imports little, so
that the engine's imports can be timed. The first run finds files that are in no cache yet, later ones usually do.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from nanoinfer.bench.engines import ENGINES, MODULES, Options, last_json, run
from nanoinfer.bench.target import Target
from nanoinfer.bench.workload import equal_workload

PROMPT_LEN = 32


@dataclass(frozen=True, slots=True)
class Startup:
    """One start of one engine, in seconds."""

    engine: str
    version: str
    python_s: float  # from the start of the process to the first line of this module's `main`
    import_s: float
    load_s: float
    first_token_s: float
    total_s: float


def measure(name: str, target: Target, options: Options, runs: int) -> list[Startup]:
    return [_start(name, target, options) for _ in range(runs)]


def _start(name: str, target: Target, options: Options) -> Startup:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    # The system's monotonic clock is one for all processes.
    what = {"engine": name, "target": asdict(target), "options": dict(options), "began": time.monotonic()}
    child = subprocess.run(
        [sys.executable, "-m", "nanoinfer.bench.startup", json.dumps(what)],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return Startup(**last_json(child.stdout))


def table(rows: Sequence[Startup]) -> list[list[str]]:
    """A line for each run."""
    header = ["engine", "run", "python s", "import s", "load s", "first token s", "total s"]
    lines, runs = [header], Counter[str]()
    for row in rows:
        runs[row.engine] += 1
        times = (row.python_s, row.import_s, row.load_s, row.first_token_s, row.total_s)
        lines.append([row.engine, str(runs[row.engine]), *(f"{seconds:.2f}" for seconds in times)])
    return lines


def main() -> None:
    started = time.monotonic()
    what = json.loads(sys.argv[1])
    import_module(MODULES[what["engine"]])
    imported = time.monotonic()
    target = Target(**what["target"])
    engine = ENGINES[what["engine"]](target, what["options"])
    loaded = time.monotonic()
    run(engine, equal_workload(1, PROMPT_LEN, 1, vocab_size=1, seed=0))
    done = time.monotonic()
    engine.close()
    times = (started - what["began"], imported - started, loaded - imported, done - loaded, done - what["began"])
    print(json.dumps(asdict(Startup(what["engine"], engine.version, *times))))


if __name__ == "__main__":
    main()
