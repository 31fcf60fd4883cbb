"""An engine whose single steps are timed: made, and brought to where all of its requests decode."""

from typing import TYPE_CHECKING

from nanoinfer.bench.engines import Options
from nanoinfer.bench.target import Target

if TYPE_CHECKING:
    from nanoinfer import LLMEngine


def open_engine(target: Target, options: Options) -> "LLMEngine":
    """Of token ids alone, as nothing but steps is timed, and without prefix caching, by which requests would differ."""
    from nanoinfer import LLMEngine

    return LLMEngine(
        target.folder, device=target.device, dtype=target.dtype, skip_tokenizer_init=True,
        load_format="dummy" if target.dummy else "auto", enable_prefix_caching=False, **options,
    )  # fmt: skip


def begin_to_decode(engine: "LLMEngine", batch: int, context: int, max_tokens: int) -> None:
    """Run `batch` requests of `context` tokens, to max_tokens each, until all have their first token.

    They have run to their end once before: a GPU's clock is low while it is idle, and takes its time to rise.
    """
    _add_requests(engine, batch, context, max_tokens)
    while engine.has_unfinished_requests():
        engine.step()
    _add_requests(engine, batch, context, max_tokens)
    while any(not seq.output_tokens for seq in engine.sequences):
        engine.step()


def _add_requests(engine: "LLMEngine", batch: int, context: int, max_tokens: int) -> None:
    from nanoinfer import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.6, detokenize=False)
    for i in range(batch):
        engine.add_request([(i + j) % 1000 for j in range(context)], params)
