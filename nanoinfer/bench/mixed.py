"""A step of decodes and of a prompt's chunk together, beside one of each alone."""

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanoinfer.bench.decoding import begin_to_decode, open_engine
from nanoinfer.bench.machine import timed
from nanoinfer.bench.target import Target

if TYPE_CHECKING:
    from nanoinfer import LLMEngine

STEPS = 8  # that are timed; the chunks of all of them are of one prompt


@dataclass(frozen=True, slots=True)
class Mixed:
    """Milliseconds a step, of `batch` decodes and of a chunk of `chunk` tokens."""

    batch: int
    context: int  # tokens of each decoding request
    chunk: int
    decode_ms: float
    prefill_ms: float
    mixed_ms: float


def measure(target: Target, batch: int, context: int, chunk: int) -> Mixed:
    options = {"max_num_seqs": batch + 1, "max_num_batched_tokens": chunk + batch}
    with closing(open_engine(target, options)) as engine:
        begin_to_decode(engine, batch, context, 8 * STEPS)
        decode = _step_ms(engine, target)
        _add_prompt(engine, chunk)
        mixed = _step_ms(engine, target)
    with closing(open_engine(target, {"max_num_seqs": 1, "max_num_batched_tokens": chunk})) as engine:
        _add_prompt(engine, chunk)
        prefill = _step_ms(engine, target)
    return Mixed(batch, context, chunk, decode, prefill, mixed)


def _add_prompt(engine: "LLMEngine", chunk: int) -> None:
    """A prompt that is still being read when the timed steps are over."""
    from nanoinfer import SamplingParams

    engine.add_request([j % 997 for j in range(chunk * (STEPS + 3))], SamplingParams(max_tokens=1, detokenize=False))


def _step_ms(engine: "LLMEngine", target: Target) -> float:
    engine.step()  # what it launches is under way when the clock starts, as what the last one launches is at its end
    return 1e3 / STEPS * timed(lambda: [engine.step() for _ in range(STEPS)], target.device)


def table(rows: list[Mixed]) -> list[list[str]]:
    header = ["decodes", "context", "chunk", "decode ms", "chunk ms", "together ms", "of the two"]
    return [header] + [
        [str(row.batch), str(row.context), str(row.chunk), f"{row.decode_ms:.3f}", f"{row.prefill_ms:.3f}",
         f"{row.mixed_ms:.3f}", f"{row.mixed_ms / (row.decode_ms + row.prefill_ms):.0%}"]
        for row in rows
    ]  # fmt: skip
