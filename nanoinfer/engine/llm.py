"""LLM: offline generation over any number of prompts."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from numbers import Real
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from nanoinfer.engine.llm_engine import LLMEngine
from nanoinfer.engine.reply import Reply
from nanoinfer.engine.requests import Request
from nanoinfer.errors import InvalidRequest
from nanoinfer.inputs import PromptType, TokensPrompt
from nanoinfer.options import NoOp, check_choice, checked_names
from nanoinfer.outputs import CompletionOutput, RequestOutput
from nanoinfer.sampling_params import SamplingParams
from nanoinfer.utils.chat import Conversation, read_conversations, render
from nanoinfer.utils.interrupts import deferred_interrupt
from nanoinfer.utils.tokenizer import load_hf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Params = SamplingParams | Sequence[SamplingParams] | None
# vLLM's arguments that ask for nothing here, with the values that mean so; any other value is refused by name.
NO_OP: NoOp = {
    "lora_request": (None,),
    "priority": (None, 0),
    "tokenization_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
}


class LLM:
    """A model to generate with; close it when done, or use it in a `with`. Takes the options of EngineConfig."""

    def __init__(self, model: str | Path, **options: object) -> None:
        self.llm_engine = LLMEngine(model, **options)
        self.model_config = self.llm_engine.model_config
        self.enqueued: list[str] = []
        self.hf_tokenizer: PreTrainedTokenizerBase | None = None

    def generate(
        self, prompts: PromptType | Sequence[PromptType], sampling_params: Params = None, *, use_tqdm: bool = True,
        callback: Callable[[RequestOutput], None] | None = None, on_error: str = "raise", **no_op: object,
    ) -> list[RequestOutput]:  # fmt: skip
        """Complete the prompts: strings, lists of token ids, or dicts with "prompt" or "prompt_token_ids".

        sampling_params: one for all, one for each, or None for the model's own defaults. Outputs come in the order of
        the prompts; `callback` gets each of them as soon as it has finished. Raises InvalidRequest naming the index of
        a prompt that cannot be served, before anything runs; with on_error="return" that prompt's output has the error,
        as has that of a request that fails while it runs, and the others are served. The output of a request that is
        aborted meanwhile has what it generated before.
        """
        check_choice("on_error", on_error, ("raise", "return"))
        checked_names("LLM.generate", no_op, {"use_tqdm", "callback", "on_error"}, NO_OP)
        failed: dict[int, RequestOutput] = {}
        requests = self._check(_as_list(prompts), sampling_params, failed if on_error == "return" else None)
        served = (i for i in range(len(requests) + len(failed)) if i not in failed)
        places: dict[str, int] = {}
        done: list[RequestOutput] = []
        try:
            with deferred_interrupt():  # no request may be queued without its id in `places`
                places.update((self.llm_engine.enqueue(request), next(served)) for request in requests)
            for output in chain(failed.values(), self._run(places, use_tqdm)):
                done.append(output)
                if callback is not None:
                    callback(output)
        finally:  # after Ctrl-C nothing of this call stays behind
            self.llm_engine.abort_request(places)
        return sorted(done, key=attrgetter("index"))

    def stream(
        self, prompts: PromptType | Sequence[PromptType], sampling_params: Params = None
    ) -> Iterator[RequestOutput]:
        """As generate, but yields what is new, text and token ids, as it comes; `index` says of which prompt.

        The deltas' texts, put together, are the text that generate gives. Leaving the loop ends the requests.
        """
        requests = self._check(_as_list(prompts), sampling_params)
        return self._stream(requests)

    def _stream(self, requests: list[Request]) -> Iterator[RequestOutput]:
        engine, open_replies = self.llm_engine, dict[str, tuple[int, Reply]]()
        try:
            with deferred_interrupt():
                for i, request in enumerate(requests):
                    request_id = engine.enqueue(request, stream=True)
                    open_replies[request_id] = i, engine.replies[request_id]
            while open_replies:
                for output in engine.step():
                    if output.request_id not in open_replies:
                        engine.hold(output)  # of a request that somebody else added
                for request_id, (i, reply) in list(open_replies.items()):
                    if reply.finished:
                        del open_replies[request_id]
                    if delta := reply.delta():
                        yield replace(delta, index=i)
        finally:
            engine.abort_request(open_replies)

    def _check(
        self, prompts: Sequence[PromptType], sampling_params: Params, failed: dict[int, RequestOutput] | None = None
    ) -> list[Request]:
        """The requests that can be served. What cannot raises InvalidRequest, or goes to `failed` by its index."""
        self.llm_engine.check_alive()
        if isinstance(sampling_params, Sequence) and len(sampling_params) != len(prompts):
            raise InvalidRequest(f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts")
        params = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * len(prompts)
        requests = []
        for i, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self.llm_engine.check(prompt, param))
            except InvalidRequest as error:
                if failed is None:
                    raise InvalidRequest(f"prompts[{i}]: {error}") from error
                choice = CompletionOutput(0, "", [], "error")
                failed[i] = RequestOutput("", None, [], [choice], finished=True, error=str(error), index=i)
        return requests

    def _run(self, places: Mapping[str, int], use_tqdm: bool) -> Iterator[RequestOutput]:
        """Step until these requests have finished; each one's output, with its place, as it comes.

        Those of requests that somebody aborts come last; of requests that were aborted before there are none.
        """
        engine = self.llm_engine
        replies = {request_id: engine.replies.get(request_id) for request_id in places}
        began, tokens_in, tokens_out = time.perf_counter(), 0, 0
        with tqdm(total=len(places), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            running = True
            while replies and running:
                outputs, running = engine.step(), engine.get_num_unfinished_requests() > 0
                for output in outputs:
                    if output.request_id not in replies:
                        engine.hold(output)  # of a request that somebody else added
                        continue
                    del replies[output.request_id]
                    tokens_in += len(output.prompt_token_ids)
                    tokens_out += sum(len(choice.token_ids) for choice in output.outputs)
                    seconds = time.perf_counter() - began
                    speed = f"input: {tokens_in / seconds:.1f} toks/s, output: {tokens_out / seconds:.1f} toks/s"
                    bar.set_postfix_str(f"est. speed {speed}", refresh=False)
                    bar.update()
                    yield replace(output, index=places[output.request_id])
        yield from (replace(reply.output(), index=places[id_]) for id_, reply in replies.items() if reply is not None)

    def enqueue(self, prompts: PromptType | Sequence[PromptType], sampling_params: Params = None) -> list[str]:
        """Queue prompts for `wait_for_completion`; their ids. Raises as generate does, and nothing is queued then."""
        ids = [self.llm_engine.enqueue(request) for request in self._check(_as_list(prompts), sampling_params)]
        self.enqueued += ids
        return ids

    def wait_for_completion(self, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """The outputs of all that was enqueued since the last call and not aborted before this one, in that order."""
        places, self.enqueued = {request_id: i for i, request_id in enumerate(self.enqueued)}, []
        try:
            return sorted(self._run(places, use_tqdm), key=attrgetter("index"))
        finally:
            self.llm_engine.abort_request(places)

    def chat(
        self, messages: Conversation | Sequence[Conversation], sampling_params: Params = None, use_tqdm: bool = True, *,
        chat_template: str | None = None, chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True, continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None, chat_template_kwargs: dict[str, Any] | None = None, **no_op: object,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer conversations, lists of {"role": ..., "content": ...}, one or several, by the model's chat template.

        content: a string, or a list of strings and {"type": "text", "text": ...} parts; the template gets a string,
        with chat_template_content_format="openai" parts. continue_final_message: go on with the last message rather
        than answer it. chat_template: another one than the model's; chat_template_kwargs: what it asks for besides.
        Raises InvalidRequest before anything runs, for a message by its place.
        """
        check_choice("chat_template_content_format", chat_template_content_format, ("auto", "string", "openai"))
        checked_names("LLM.chat", no_op, set(), NO_OP)
        options = {"tools": tools, "chat_template": chat_template, "continue_final_message": continue_final_message}
        options |= {"add_generation_prompt": add_generation_prompt and not continue_final_message}
        options |= chat_template_kwargs or {}
        tokenizer = self.get_tokenizer()
        conversations = read_conversations(messages, chat_template_content_format)
        texts = [render(tokenizer, conversation, **options) for conversation in conversations]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        prompts = [TokensPrompt(prompt_token_ids=i, prompt=text) for i, text in zip(ids, texts, strict=True)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while a request runs."""
        return self.llm_engine.reset_prefix_cache()

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer as transformers has it, chat template included; read when first asked for."""
        if self.hf_tokenizer is None:
            self.hf_tokenizer = load_hf_tokenizer(self.llm_engine.tokenizer_folder)
        return self.hf_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return self.llm_engine.default_sampling_params()

    def close(self) -> None:
        """Give the memory back; later calls raise EngineDead. Closing twice is fine."""
        self.llm_engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_list(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """Several prompts as they are, a single one as a list of one; a flat list of ids is a single prompt."""
    if isinstance(prompts, (str, Mapping)) or not hasattr(prompts, "__len__"):
        return [cast(PromptType, prompts)]
    many = list(cast("Sequence[PromptType]", prompts))
    return [cast(PromptType, prompts)] if many and isinstance(many[0], Real) else many
