"""One decode step on a GPU, kernel by kernel, as torch's profiler sees it.

A kernel may start while the one before still runs, and then wait for it (programmatic dependent launch), so durations
overlap. What a kernel costs is therefore the time from the end of the one before to its own end; these times and the
gaps, in which nothing runs, add up to the step. Of few rows the product of queries, keys and values rotates and stores
them as well. The profiler itself holds up small kernels: what a step takes without it is measured first, and told
beside.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nanoinfer.bench.decoding import begin_to_decode, open_engine
from nanoinfer.bench.engines import Options
from nanoinfer.bench.machine import timed
from nanoinfer.bench.target import Target

Event = dict[str, Any]  # of a trace

STEPS = 12  # under the profiler
PLAIN_STEPS = 40  # without it, timed three times: of so many, waiting for the last one is a small part
KINDS = {
    "linear": r"thin_linear|linear|nvjet|gemm|cutlass|cublas|splitK",
    "attention": r"decode|prefill|merge|attention",
    "rotary and store": r"rotary|store_kv",
    "norm": r"norm",
    "activation": r"silu",
    "sampling": r"sample|penalize",
}


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel or copy of the step, in microseconds from the step's begin."""

    name: str
    start: float
    end: float
    cost: float  # from the end of the one before, or its own start where that is later, to its end

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, self.name, re.I)), "other")


@dataclass(frozen=True, slots=True)
class Profile:
    """A decode step of `batch` requests of about `context` tokens."""

    batch: int
    context: int
    step_us: float  # median from one step's begin to the next one's
    plain_us: float  # the same without the profiler
    spans: list[Span]

    def costs(self) -> dict[str, float]:
        """Microseconds by kind, largest first; "idle" is the rest of the step."""
        found = Counter[str]()
        for span in self.spans:
            found[span.kind] += span.cost  # type: ignore[assignment]
        found["idle"] = max(self.step_us - sum(found.values()), 0.0)  # type: ignore[assignment]
        return dict(found.most_common())


def measure(target: Target, options: Options, batch: int, context: int) -> Profile:
    """Profile a steady decode step. Raises SystemExit without CUDA."""
    if target.device != "cuda":
        raise SystemExit("profile needs a CUDA device: it shows what runs on a GPU")
    engine = open_engine(target, {"max_num_seqs": batch, **options})
    begin_to_decode(engine, batch, context, 4 * PLAIN_STEPS)
    steps = range(PLAIN_STEPS)
    plain_us = 1e6 / PLAIN_STEPS * median(timed(lambda: [engine.step() for _ in steps], "cuda") for _ in range(3))
    begin_to_decode(engine, batch, context, 2 * STEPS)  # once more: contexts have grown
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
    engine.close()
    with TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return from_events(events, batch, context, plain_us, STEPS)


def from_events(events: Sequence[Event], batch: int, context: int, plain_us: float, steps: int) -> Profile:
    """The step of median length among those in a trace, of which there are to be `steps`, at least 3.

    A step begins where its message, which came while the one before ran, is moved to where the graphs read it.
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    shown = sorted((event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"])
    begins = [i for i, event in enumerate(shown) if "DtoD" in event["name"]]
    if len(begins) != steps:
        raise SystemExit(f"the trace shows {len(begins)} steps, expected {steps}: is another profiler attached?")
    lengths = [shown[b]["ts"] - shown[a]["ts"] for a, b in pairwise(begins)]
    typical = median(lengths)
    chosen = min(range(len(lengths)), key=lambda i: abs(lengths[i] - typical))
    return Profile(batch, context, typical, plain_us, _spans(shown[begins[chosen] : begins[chosen + 1]]))


def _spans(events: Sequence[Event]) -> list[Span]:
    spans, origin, last_end = list[Span](), events[0]["ts"], 0.0
    for event in events:
        start = event["ts"] - origin
        end = start + event["dur"]
        spans.append(Span(short_name(event["name"]), start, end, max(0.0, end - max(last_end, start))))
        last_end = max(last_end, end)
    return spans


def short_name(name: str) -> str:
    """The function's own name, without namespaces, template and "_kernel"."""
    plain = re.sub(r"\(anonymous namespace\)::", "", name)
    found = re.match(r"(?:void )?([\w:]+)", plain)
    return (found.group(1).split("::")[-1] if found else plain).removesuffix("_kernel")


def table(profiles: Sequence[Profile]) -> list[list[str]]:
    """A line for each batch: microseconds by kind."""
    names = list(dict.fromkeys(name for profile in profiles for name in profile.costs()))
    lines = [["batch", "context", "step us", "profiled", *names]]
    for profile in profiles:
        costs = profile.costs()
        values = [f"{costs.get(name, 0.0):.0f}" for name in names]
        step = [f"{profile.plain_us:.0f}", f"{profile.step_us:.0f}"]
        lines.append([str(profile.batch), str(profile.context), *step, *values])
    return lines
