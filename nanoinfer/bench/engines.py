"""One adapter for each engine: the same token ids in, the same number of tokens out. Light to import.

Engines are imported when they start, so that start-up can be timed and an absent one can be skipped. What an adapter
does not need is left at the engine's default; options are nanoinfer's names, translated where an engine has the same
notion under another name.
"""

import gc
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

from nanoinfer.bench.target import Target
from nanoinfer.bench.workload import Workload

Options = Mapping[str, object]

# Those that take SamplingParams by nanoinfer's names.
TAKE_SAMPLING = ("nanoinfer", "vllm")

# What to import, so that nothing is left to import when the engine starts.
MODULES = {
    "nanoinfer": "nanoinfer.engine.llm",
    "hf": "transformers.models.qwen2.modeling_qwen2",
    "vllm": "vllm",
    "sglang": "sglang",
}


class Engine(Protocol):
    """A started engine."""

    version: str

    def generate(self, workload: Workload) -> list[list[int]]:
        """The tokens generated for each request."""

    def close(self) -> None:
        """Give the memory back."""


class Nanoinfer:
    """nanoinfer.LLM."""

    def __init__(self, target: Target, options: Options) -> None:
        from nanoinfer import LLM, ops

        self.version = str(import_module("nanoinfer").__version__)
        if missing := ops.missing_kernels(target.device.upper()):
            self.version += f" (not compiled: {', '.join(missing)})"
        self.llm = LLM(
            target.folder, device=target.device, dtype=target.dtype, skip_tokenizer_init=True,
            load_format="dummy" if target.dummy else "auto", **options,
        )  # fmt: skip

    def generate(self, workload: Workload) -> list[list[int]]:
        from nanoinfer import SamplingParams

        params = [
            SamplingParams(
                temperature=workload.temperature, max_tokens=length, ignore_eos=True, detokenize=False,
                **workload.sampling,
            )
            for length in workload.output_lens
        ]  # fmt: skip
        outputs = self.llm.generate(workload.prompts, params, use_tqdm=False)
        if errors := [output.error for output in outputs if output.error]:
            raise RuntimeError(f"{len(errors)} of {len(outputs)} requests failed: {errors[0]}")
        return [output.outputs[0].token_ids for output in outputs]

    def close(self) -> None:
        self.llm.close()


class HuggingFace:
    """transformers' generate() on batches of requests in order, padded on the left, each run to its longest output.

    Batches hold at most `max_num_seqs` requests (64 unless given); 1 runs them one by one, without padding. Tokens past
    a request's length are computed and not counted. No other option means anything to it.
    """

    def __init__(self, target: Target, options: Options) -> None:
        import torch

        transformers = import_module("transformers")
        self.version, self.device = str(transformers.__version__), torch.device(target.device)
        self.batch_size = int(str(options.get("max_num_seqs", 64)))
        loader, dtype = transformers.AutoModelForCausalLM, target.torch_dtype()
        if target.dummy:
            torch.manual_seed(0)
            with self.device:
                model = loader.from_config(transformers.AutoConfig.from_pretrained(target.folder), dtype=dtype)
        else:
            model = loader.from_pretrained(target.folder, dtype=dtype)
        self.model = model.to(self.device).eval()
        # The model's own defaults would fill in what a GenerationConfig leaves open, the end-of-sequence ids included.
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)

    def generate(self, workload: Workload) -> list[list[int]]:
        results: list[list[int]] = []
        for begin in range(0, len(workload.prompts), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            results += self._generate_batch(workload.prompts[part], workload.output_lens[part], workload.temperature)
        return results

    def _generate_batch(self, prompts: list[list[int]], lengths: list[int], temperature: float) -> list[list[int]]:
        import torch

        width, longest = max(map(len, prompts)), max(lengths)
        padding = [width - len(prompt) for prompt in prompts]
        ids = [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor(ids, device=self.device), attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=longest, min_new_tokens=longest, **sampling,
            )  # fmt: skip
        return [row[width : width + length] for row, length in zip(out.tolist(), lengths, strict=True)]

    def close(self) -> None:
        import torch

        del self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class VLLM:
    """vLLM's offline LLM class. Written to its documented interface and tested against a stand-in only."""

    def __init__(self, target: Target, options: Options) -> None:
        self.module = import_module("vllm")
        self.version = str(self.module.__version__)
        self.llm = self.module.LLM(
            model=target.folder, dtype=target.dtype, skip_tokenizer_init=True, seed=0,
            load_format="dummy" if target.dummy else "auto", **options,
        )  # fmt: skip

    def generate(self, workload: Workload) -> list[list[int]]:
        params = [
            self.module.SamplingParams(
                temperature=workload.temperature, max_tokens=length, ignore_eos=True, detokenize=False,
                **workload.sampling,
            )
            for length in workload.output_lens
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in workload.prompts]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """vLLM's processes end with the last reference to its engine."""
        del self.llm
        gc.collect()


class SGLang:
    """SGLang's offline Engine. Written to its documented interface and tested against a stand-in only."""

    NAMES: ClassVar = {
        "max_num_seqs": "max_running_requests",
        "max_model_len": "context_length",
        "max_num_batched_tokens": "chunked_prefill_size",
        "block_size": "page_size",
        "enforce_eager": "disable_cuda_graph",
    }

    def __init__(self, target: Target, options: Options) -> None:
        module = import_module("sglang")
        self.version = str(module.__version__)
        named = {self.NAMES[key]: value for key, value in options.items() if key in self.NAMES}
        if options.get("enable_prefix_caching") is False:
            named["disable_radix_cache"] = True
        self.engine = module.Engine(
            model_path=target.folder, dtype=target.dtype, device=target.device, skip_tokenizer_init=True,
            random_seed=0, load_format="dummy" if target.dummy else "auto", **named,
        )  # fmt: skip

    def generate(self, workload: Workload) -> list[list[int]]:
        params = [{"temperature": workload.temperature, "max_new_tokens": length, "ignore_eos": True}
                  for length in workload.output_lens]  # fmt: skip
        outputs = self.engine.generate(input_ids=workload.prompts, sampling_params=params)
        return [list(output["output_ids"]) for output in outputs]

    def close(self) -> None:
        self.engine.shutdown()


ENGINES: dict[str, Callable[[Target, Options], Engine]] = {
    "nanoinfer": Nanoinfer,
    "hf": HuggingFace,
    "vllm": VLLM,
    "sglang": SGLang,
}


def is_installed(name: str) -> bool:
    """Whether the engine's package is there; it is not imported."""
    try:
        return find_spec(MODULES[name].split(".")[0]) is not None
    except ValueError:  # a module without a spec is in sys.modules: it is there
        return True


def last_json(output: str) -> dict[str, Any]:
    """The last JSON object in the output of a process that ran an engine, whose workers may write while they end."""
    values: dict[str, Any] = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    return values


def run(engine: Engine, workload: Workload) -> None:
    """Serve the workload. Raises RuntimeError where a request got another number of tokens than it was to get."""
    got = [len(tokens) for tokens in engine.generate(workload)]
    if got != workload.output_lens:
        wrong = [i for i, pair in enumerate(zip(got, workload.output_lens, strict=True)) if pair[0] != pair[1]]
        raise RuntimeError(
            f"request {wrong[0]} got {got[wrong[0]]} tokens instead of {workload.output_lens[wrong[0]]} "
            f"({len(wrong)} of {len(got)} requests are wrong): this run measures another workload"
        )
