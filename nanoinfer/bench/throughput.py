"""Many requests of different lengths at once: tokens per second, beside what the hardware allows."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanoinfer.bench.engines import ENGINES, Options, run
from nanoinfer.bench.machine import peak_memory, timed
from nanoinfer.bench.report import MEMORY_HEADER, memory
from nanoinfer.bench.target import Target
from nanoinfer.bench.workload import Workload, random_workload


@dataclass(frozen=True, slots=True)
class Throughput:
    """One engine's run of the whole workload."""

    engine: str
    version: str
    seconds: float
    requests_per_s: float
    total_tokens_per_s: float  # prompt and output tokens
    output_tokens_per_s: float
    peak_rss_bytes: int
    peak_cuda_bytes: int | None


def measure(name: str, target: Target, options: Options, workload: Workload, vocab_size: int) -> Throughput:
    """Run the workload once, after a small one of other prompts for what an engine does on first use."""
    engine = ENGINES[name](target, options)
    warm_up = random_workload(
        8, (16, 32), (4, 8), vocab_size=vocab_size, temperature=workload.temperature, seed=-1,
        sampling=workload.sampling,
    )  # fmt: skip
    run(engine, warm_up)
    seconds = timed(lambda: run(engine, workload), target.device)
    peak = peak_memory(target.device)
    engine.close()
    out, total = workload.num_output_tokens, workload.num_prompt_tokens + workload.num_output_tokens
    return Throughput(
        name, engine.version, seconds, len(workload.prompts) / seconds, total / seconds, out / seconds,
        peak.rss_bytes, peak.cuda_bytes,
    )  # fmt: skip


def table(rows: Sequence[Throughput], best: float) -> list[list[str]]:
    """best: output tokens per second that the hardware allows."""
    header = ["engine", "output tok/s", "of limit", "total tok/s", "requests/s", "seconds", *MEMORY_HEADER]
    lines = [[row.engine, f"{row.output_tokens_per_s:,.1f}", f"{row.output_tokens_per_s / best:.1%}",
              f"{row.total_tokens_per_s:,.1f}", f"{row.requests_per_s:.2f}", f"{row.seconds:.2f}",
              *memory(row.peak_rss_bytes, row.peak_cuda_bytes)] for row in rows]  # fmt: skip
    return [header, *lines, ["limit", f"{best:,.1f}"]]
