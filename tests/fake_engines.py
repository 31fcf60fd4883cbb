"""Stand-ins for vLLM and SGLang: what bench.py calls of them, and nothing else."""

from types import ModuleType, SimpleNamespace


class FakeVLLM(ModuleType):
    """What the adapter may use of vllm."""

    __version__ = "9.9"

    def __init__(self) -> None:
        super().__init__("vllm")
        self.seen: list = []

    @staticmethod
    def SamplingParams(*, temperature, max_tokens, ignore_eos, detokenize):  # noqa: N802
        assert ignore_eos and not detokenize
        return SimpleNamespace(temperature=temperature, max_tokens=max_tokens)

    def LLM(self, **options):  # noqa: N802
        self.options = options
        return SimpleNamespace(generate=self.generate)

    def generate(self, prompts, params, use_tqdm):
        self.seen = [(prompt["prompt_token_ids"], param.max_tokens, param.temperature)
                     for prompt, param in zip(prompts, params, strict=True)]  # fmt: skip
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(1,) * param.max_tokens)]) for param in params]


class FakeSGLang(ModuleType):
    """What the adapter may use of sglang."""

    __version__ = "9.9"

    def __init__(self) -> None:
        super().__init__("sglang")
        self.seen: list = []
        self.stopped = False

    def Engine(self, **options):  # noqa: N802
        self.options = options
        return SimpleNamespace(generate=self.generate, shutdown=lambda: setattr(self, "stopped", True))

    def generate(self, *, input_ids, sampling_params):
        assert all(params["ignore_eos"] for params in sampling_params)
        self.seen = [(ids, params["max_new_tokens"], params["temperature"])
                     for ids, params in zip(input_ids, sampling_params, strict=True)]  # fmt: skip
        return [{"output_ids": [1] * params["max_new_tokens"]} for params in sampling_params]
