"""LLMEngine: requests in, steps, outputs out. It knows nothing of HTTP, threads or asyncio."""

from collections.abc import Iterable
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import cast

from nanoinfer.engine.block_manager import BlockManager
from nanoinfer.engine.requests import Request, make_request
from nanoinfer.engine.scheduler import Scheduler
from nanoinfer.engine.sequence import Sequence
from nanoinfer.engine.startup import start
from nanoinfer.engine.step_loop import StepLoop
from nanoinfer.engine_config import EngineConfig
from nanoinfer.errors import EngineDead, InvalidRequest
from nanoinfer.inputs import PromptType
from nanoinfer.outputs import CompletionOutput, RequestOutput
from nanoinfer.sampling_params import SamplingParams
from nanoinfer.utils.interrupts import deferred_interrupt

CLOSED = "the engine is closed"


def derived_seed(engine_seed: int, index: int) -> int:
    """The seed of request number `index` that has none of its own: a hash, so that neighbours share no numbers."""
    return int.from_bytes(blake2b(f"{engine_seed} {index}".encode(), digest_size=8).digest(), "little")


class LLMEngine:
    """Continuous batching over one model: `add_request`, then `step` while `has_unfinished_requests`.

    Takes the options of EngineConfig, with vLLM's names. Raises InvalidRequest or TypeError for a wrong option,
    ModelLoadError for a wrong model.
    """

    def __init__(self, model: str | Path, **options: object) -> None:
        self.config = config = EngineConfig.from_options(model, **options)
        # A finished request keeps its row until its last launched step is committed, hence twice as many.
        num_rows = 2 * config.max_num_seqs
        parts = start(config, num_rows)
        self.model_config, self.limits = parts.model_config, parts.limits
        self.tokenizer, self.tokenizer_folder = parts.tokenizer, parts.folder
        self.runner = parts.runner
        self.blocks = BlockManager(
            parts.cache.num_blocks, parts.cache.block_size, config.enable_prefix_caching is not False
        )
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, parts.max_num_batched_tokens, num_rows)
        asynchronous = parts.traits.asynchronous if config.async_scheduling is None else config.async_scheduling
        self.loop = StepLoop(self.scheduler, self.runner, steps_ahead=int(asynchronous))
        self.sequences: dict[str, Sequence] = {}
        self.held: list[RequestOutput] = []
        self.num_requests = 0
        self.dead: str | None = None

    def add_request(
        self, *args: object, request_id: str | None = None, prompt: PromptType | None = None,
        params: SamplingParams | None = None, sampling_params: SamplingParams | None = None,
    ) -> str:  # fmt: skip
        """Queue a request: `add_request(prompt, sampling_params)` or `add_request(request_id, prompt, params)`.

        The first positional argument is an id only where all three are given. Without parameters the model's own
        defaults hold. Returns the id. Raises InvalidRequest, and nothing is queued then.
        """
        params = params or sampling_params
        all_three = len(args) + (prompt is not None) + (params is not None) == 3
        names = ["request_id", "prompt", "params"] if all_three else ["prompt", "params"]
        named = {"request_id": request_id, "prompt": prompt, "params": params}
        if len(args) > len(names) or any(named[name] is not None for name in names[: len(args)]):
            raise TypeError(f"add_request takes (request_id, prompt, params), each once; got {len(args)} by position")
        given = {"request_id": request_id, "prompt": prompt, "params": params} | dict(zip(names, args, strict=False))
        request = self.check(cast(PromptType, given["prompt"]), cast("SamplingParams | None", given["params"]))
        return self.enqueue(request, cast("str | None", given["request_id"]))

    def check(self, prompt: PromptType, params: SamplingParams | None = None) -> Request:
        """The request, validated; nothing is queued. Raises InvalidRequest, EngineDead."""
        self.check_alive()
        return make_request(
            prompt, self.default_sampling_params() if params is None else params, self.tokenizer, self.limits
        )

    def check_alive(self) -> None:
        """Raise EngineDead where the engine is closed or broken."""
        if self.dead:
            raise EngineDead(self.dead)

    def enqueue(self, request: Request, request_id: str | None = None) -> str:
        """Queue a checked request under an id of its own. Raises InvalidRequest where a live one has that id."""
        index = self.num_requests
        if request_id is None:
            request_id = next(name for name in map(str, count(index)) if name not in self.sequences)
        elif not isinstance(request_id, str):
            raise InvalidRequest(f"request_id must be a string, got {request_id!r}")
        if request_id in self.sequences:
            raise InvalidRequest(f"request_id {request_id!r} belongs to an unfinished request")
        params = request.params
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        seq = Sequence(
            request_id, index, request.token_ids.copy(), len(request.token_ids), params, request.max_length,
            frozenset(eos).union(params.stop_token_ids or ()),
            int(params.seed) if params.seed is not None else derived_seed(self.config.seed, index),
            request.prompt, request.cache_salt,
        )  # fmt: skip
        self.num_requests += 1
        self.sequences[request_id] = seq
        self.scheduler.add(seq)
        return request_id

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        defaults = self.model_config.generation
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        options = {name: getattr(defaults, name) for name in names} | {"max_tokens": defaults.max_new_tokens}
        return SamplingParams(**{name: value for name, value in options.items() if value is not None})

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests now; unknown and finished ids are ignored. Their output is not returned.

        Ctrl-C waits until all have ended: who pressed it once, and got here by it, often presses it again.
        """
        ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        with deferred_interrupt():
            for request_id in ids:
                if seq := self.sequences.pop(request_id, None):
                    self.scheduler.abort(seq)
            self.held = [output for output in self.held if output.request_id not in ids]

    def has_unfinished_requests(self) -> bool:
        return bool(self.sequences or self.loop.launched or self.held)

    def is_finished(self) -> bool:
        return not self.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        return len(self.sequences)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while a request runs."""
        return self.blocks.reset_prefix_cache()

    def step(self) -> list[RequestOutput]:
        """Launch the next step and commit the one before; the requests that finished.

        Ctrl-C waits for the step's end. Where a step fails, the requests in it finish with reason "error". Raises
        EngineDead where the device is lost, and from then on.
        """
        self.check_alive()
        with deferred_interrupt():
            try:
                finished = self.loop.step()
            except EngineDead as error:
                self.dead = str(error)
                raise
            except BaseException as error:
                self.dead = f"a step was cut off half-way by {error!r}"
                raise
            for seq in finished:
                del self.sequences[seq.request_id]
            self.held += [self._output(seq) for seq in finished]
        outputs, self.held = self.held, []  # not reached by an interrupt: the next step returns them
        return outputs

    def hold(self, output: RequestOutput) -> None:
        """Keep an output that a caller of `step` did not ask for, for the next caller."""
        self.held.append(output)

    def _output(self, seq: Sequence) -> RequestOutput:
        ids, text = seq.output_tokens, ""
        if self.tokenizer and seq.params.detokenize:
            shown = ids[:-1] if seq.finish_reason == "stop" else ids  # what ended the text is no part of it
            text = self.tokenizer.decode(shown, seq.params.skip_special_tokens)
        return RequestOutput(
            seq.request_id, seq.prompt, seq.tokens[: seq.num_prompt_tokens],
            [CompletionOutput(0, text, ids, seq.finish_reason, seq.stop_reason)],
            finished=seq.finish_reason is not None, num_cached_tokens=seq.num_cached_tokens, error=seq.error,
        )  # fmt: skip

    def close(self) -> None:
        """Give the weights and the KV pool back; the engine serves nothing any more. Closing twice is fine."""
        if self.dead != CLOSED:
            self.dead = CLOSED
            self.sequences.clear()
            self.held.clear()
            self.loop.launched.clear()
            self.runner.close()
