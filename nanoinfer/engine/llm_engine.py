"""LLMEngine: requests in, steps, outputs out. It knows nothing of HTTP, threads or asyncio."""

from collections.abc import Callable, Iterable
from hashlib import blake2b
from itertools import count
from pathlib import Path
from time import monotonic
from typing import cast

from nanoinfer.engine.block_manager import BlockManager
from nanoinfer.engine.reply import Reply, TextStream
from nanoinfer.engine.requests import Request, make_request
from nanoinfer.engine.scheduler import Scheduler
from nanoinfer.engine.sequence import Sequence, Status
from nanoinfer.engine.startup import start
from nanoinfer.engine.step_loop import StepLoop
from nanoinfer.engine_config import EngineConfig
from nanoinfer.errors import EngineDead, InvalidRequest
from nanoinfer.inputs import PromptType
from nanoinfer.outputs import RequestOutput
from nanoinfer.sampling_params import SamplingParams
from nanoinfer.utils.detokenizer import Detokenizer, make_detokenizers
from nanoinfer.utils.interrupts import deferred_interrupt
from nanoinfer.utils.stop_strings import StopFilter, StopStrings

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
        self.replies: dict[str, Reply] = {}  # by request id, until all of it has finished
        self.watched: dict[str, Reply] = {}  # those of them whose text somebody follows
        self.detokenizers: dict[bool, Callable[[], Detokenizer]] = {}  # by skip_special_tokens, made when first asked
        self.held: list[RequestOutput] = []
        self.num_sequences = 0
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

    def enqueue(self, request: Request, request_id: str | None = None, *, stream: bool = False) -> str:
        """Queue a checked request under an id of its own. Raises InvalidRequest where a live one has that id.

        stream: keep its text up to date, for `replies[request_id].delta()`.
        """
        if request_id is None:
            request_id = next(name for name in map(str, count(self.num_sequences)) if name not in self.replies)
        elif not isinstance(request_id, str):
            raise InvalidRequest(f"request_id must be a string, got {request_id!r}")
        if request_id in self.replies:
            raise InvalidRequest(f"request_id {request_id!r} belongs to an unfinished request")
        seqs = [self._sequence(request, request_id, i) for i in range(request.params.n)]
        follow = stream or bool(request.params.stop)
        reply = Reply(seqs, [self._text_stream(request.params) for _ in seqs] if follow else [])
        self.replies[request_id] = reply
        if follow:
            self.watched[request_id] = reply
        for seq in seqs:
            self.scheduler.add(seq)
        return request_id

    def _sequence(self, request: Request, request_id: str, choice: int) -> Sequence:
        """The request's choice number `choice`; those with a seed use it, the next number, and so on."""
        params, index = request.params, self.num_sequences
        self.num_sequences += 1
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        return Sequence(
            request_id, index, request.token_ids.copy(), len(request.token_ids), params, request.max_length,
            frozenset(eos).union(params.stop_token_ids or ()),
            derived_seed(self.config.seed, index) if params.seed is None else int(params.seed) + choice,
            request.prompt, request.cache_salt, arrival_time=monotonic(),
        )  # fmt: skip

    def _text_stream(self, params: SamplingParams) -> TextStream:
        if self.tokenizer is None or not params.detokenize:
            return TextStream(None, None)
        skip = params.skip_special_tokens
        if skip not in self.detokenizers:
            self.detokenizers[skip] = make_detokenizers(self.tokenizer, skip)
        stops = StopFilter(StopStrings(params.stop), params.include_stop_str_in_output) if params.stop else None
        return TextStream(self.detokenizers[skip](), stops)

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
                if reply := self.replies.pop(request_id, None):
                    self.watched.pop(request_id, None)
                    for seq in reply.seqs:
                        self.scheduler.abort(seq)
            self.held = [output for output in self.held if output.request_id not in ids]

    @property
    def sequences(self) -> list[Sequence]:
        """Those of unfinished requests, in order of arrival."""
        return [seq for reply in self.replies.values() for seq in reply.seqs]

    def has_unfinished_requests(self) -> bool:
        return bool(self.replies or self.loop.launched or self.held)

    def is_finished(self) -> bool:
        return not self.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        return len(self.replies)

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
            finished += self._follow_texts()
            for seq in finished:
                self._close(seq.request_id)
        outputs, self.held = self.held, []  # not reached by an interrupt: the next step returns them
        return outputs

    def hold(self, output: RequestOutput) -> None:
        """Keep an output that a caller of `step` did not ask for, for the next caller."""
        self.held.append(output)

    def _follow_texts(self) -> list[Sequence]:
        """Take new tokens into the texts that somebody follows; the sequences that a stop string ends."""
        stopped = list[Sequence]()
        for reply in self.watched.values():
            for seq, stream in zip(reply.seqs, reply.streams, strict=True):
                if not stream.closed and (found := stream.advance(seq)) is not None:
                    if seq.status is not Status.FINISHED:
                        stopped.append(seq)
                    self.scheduler.stop(seq, found)
        return stopped

    def _close(self, request_id: str) -> None:
        """One of the request's sequences has finished; with the last one the request has."""
        reply = self.replies.get(request_id)
        if reply is not None and reply.finished:
            del self.replies[request_id]
            self.watched.pop(request_id, None)
            self.held.append(reply.output(self.tokenizer))

    def close(self) -> None:
        """Give the weights and the KV pool back; the engine serves nothing any more. Closing twice is fine."""
        if self.dead != CLOSED:
            self.dead = CLOSED
            self.replies.clear()
            self.watched.clear()
            self.held.clear()
            self.loop.launched.clear()
            self.runner.close()
