"""A batch of equal requests: milliseconds for each decode step beside the time to read its bytes, and prefill speed.

Every engine is timed in the same way, from outside: equal greedy requests, once for a single token (the prefill) and
once for `output_len` tokens. The difference over output_len - 1 is a decode step, scheduling and sampling included;
what both runs have in common drops out. Medians of several repeats. Prefix caching must be off: a repeat would find its
prompts' KV from the time before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from nanoinfer.bench.cost import ModelCost
from nanoinfer.bench.engines import ENGINES, Engine, Options, run
from nanoinfer.bench.machine import Limits, peak_memory, timed
from nanoinfer.bench.report import MEMORY_HEADER, memory
from nanoinfer.bench.target import Target
from nanoinfer.bench.workload import equal_workload


@dataclass(frozen=True, slots=True)
class Latency:
    """One engine at one batch size and context."""

    engine: str
    version: str
    batch: int
    context: int  # prompt tokens of each request
    decode_ms: float  # one step, a token for every request
    decode_tokens_per_s: float
    prefill_ms: float  # all prompts, and the first token of each
    prefill_tokens_per_s: float
    peak_rss_bytes: int  # so far
    peak_cuda_bytes: int | None


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that the hardware takes for it."""

    batch: int
    context: int
    decode_ms: float
    prefill_ms: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to measure: every batch size with every context."""

    batches: Sequence[int]
    contexts: Sequence[int]
    output_len: int
    repeats: int
    seed: int

    def points(self) -> Iterator[tuple[int, int]]:
        return ((batch, context) for context in self.contexts for batch in self.batches)


def measure(name: str, target: Target, options: Options, sweep: Sweep, vocab_size: int) -> list[Latency]:
    engine = ENGINES[name](target, options)
    rows = [_measure_point(name, engine, target.device, batch, context, sweep, vocab_size)
            for batch, context in sweep.points()]  # fmt: skip
    engine.close()
    return rows


def _measure_point(
    name: str, engine: Engine, device: str, batch: int, context: int, sweep: Sweep, vocab_size: int
) -> Latency:
    short, long = (equal_workload(batch, context, length, vocab_size=vocab_size, seed=sweep.seed)
                   for length in (1, sweep.output_len))  # fmt: skip
    run(engine, long)  # warm-up
    prefills, totals = [], []
    for _ in range(sweep.repeats):
        prefills.append(timed(lambda: run(engine, short), device))
        totals.append(timed(lambda: run(engine, long), device))
    prefill, total = median(prefills), median(totals)
    if total <= prefill:
        raise SystemExit(
            f"{sweep.output_len} tokens took {total:.4f} s, and one {prefill:.4f} s: other work disturbs this machine, "
            "or --output-len and --repeats are too small"
        )
    step = (total - prefill) / (sweep.output_len - 1)
    peak = peak_memory(device)
    return Latency(
        name, engine.version, batch, context, 1e3 * step, batch / step, 1e3 * prefill, batch * context / prefill,
        peak.rss_bytes, peak.cuda_bytes,
    )  # fmt: skip


def floors(sweep: Sweep, cost: ModelCost, limits: Limits) -> list[Floor]:
    """For each point; a decode step's at the context in the middle of the output."""
    return [
        Floor(
            batch, context, 1e3 * cost.decode_seconds(batch, context + sweep.output_len / 2, limits),
            1e3 * cost.prefill_seconds([context] * batch, limits),
        )
        for batch, context in sweep.points()
    ]  # fmt: skip


def table(rows: Sequence[Latency], floors: Sequence[Floor]) -> list[list[str]]:
    least = {(floor.batch, floor.context): floor for floor in floors}
    header = ["engine", "batch", "context", "decode ms", "floor ms", "of floor", "decode tok/s",
              "prefill ms", "floor ms", "prefill tok/s", *MEMORY_HEADER]  # fmt: skip
    lines = [header]
    for row in rows:
        floor = least[row.batch, row.context]
        lines.append([
            row.engine, str(row.batch), str(row.context), f"{row.decode_ms:.3f}", f"{floor.decode_ms:.3f}",
            f"{floor.decode_ms / row.decode_ms:.0%}", f"{row.decode_tokens_per_s:,.1f}", f"{row.prefill_ms:.1f}",
            f"{floor.prefill_ms:.1f}", f"{row.prefill_tokens_per_s:,.1f}",
            *memory(row.peak_rss_bytes, row.peak_cuda_bytes),
        ])  # fmt: skip
    return lines
