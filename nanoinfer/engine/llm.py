"""LLM: offline generation over any number of prompts."""

import time
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

from tqdm import tqdm

from nanoinfer.engine.llm_engine import LLMEngine
from nanoinfer.engine.requests import Request
from nanoinfer.errors import InvalidRequest
from nanoinfer.inputs import PromptType
from nanoinfer.outputs import RequestOutput
from nanoinfer.sampling_params import SamplingParams
from nanoinfer.utils.interrupts import deferred_interrupt
from nanoinfer.utils.tokenizer import load_hf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model to generate with; close it when done, or use it in a `with`. Takes the options of EngineConfig."""

    def __init__(self, model: str | Path, **options: object) -> None:
        self.llm_engine = LLMEngine(model, **options)

    def generate(
        self, prompts: PromptType | Sequence[PromptType], sampling_params: Params = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Complete the prompts: strings, lists of token ids, or dicts with "prompt" or "prompt_token_ids".

        sampling_params: one for all, one for each, or None for the model's own defaults. Outputs come in the order of
        the prompts. Raises InvalidRequest naming the index of a prompt that cannot be served, before anything runs.
        A request that fails while it runs has finish_reason "error" and leaves the others alone.
        """
        self.llm_engine.check_alive()
        requests = self._check(_as_list(prompts), sampling_params)
        ids: list[str] = []
        try:
            with deferred_interrupt():  # no request may be queued without its id in `ids`
                ids.extend(self.llm_engine.enqueue(request) for request in requests)
            done = self._run(ids, use_tqdm)
        finally:  # after Ctrl-C nothing of this call stays behind
            self.llm_engine.abort_request(ids)
        return [done[request_id] for request_id in ids]

    def _check(self, prompts: Sequence[PromptType], sampling_params: Params) -> list[Request]:
        if isinstance(sampling_params, Sequence) and len(sampling_params) != len(prompts):
            raise InvalidRequest(f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts")
        params = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * len(prompts)
        requests = []
        for i, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self.llm_engine.check(prompt, param))
            except InvalidRequest as error:
                raise InvalidRequest(f"prompts[{i}]: {error}") from error
        return requests

    def _run(self, ids: list[str], use_tqdm: bool) -> dict[str, RequestOutput]:
        wanted, done = set(ids), dict[str, RequestOutput]()
        began, tokens_in, tokens_out = time.perf_counter(), 0, 0
        with tqdm(total=len(ids), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            while len(done) < len(ids):
                for output in self.llm_engine.step():
                    if output.request_id not in wanted:
                        self.llm_engine.hold(output)  # of a request that somebody else added
                        continue
                    done[output.request_id] = output
                    tokens_in += len(output.prompt_token_ids)
                    tokens_out += len(output.outputs[0].token_ids)
                    seconds = time.perf_counter() - began
                    speed = f"input: {tokens_in / seconds:.1f} toks/s, output: {tokens_out / seconds:.1f} toks/s"
                    bar.set_postfix_str(f"est. speed {speed}", refresh=False)
                    bar.update()
        return done

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer as transformers has it, chat template included."""
        return load_hf_tokenizer(self.llm_engine.tokenizer_folder)

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
