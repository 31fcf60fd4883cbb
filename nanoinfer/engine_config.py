"""EngineConfig: how an engine runs, with vLLM's option names; validated when made, before anything is loaded."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from nanoinfer.config import DTYPES as CHECKPOINT_DTYPES
from nanoinfer.errors import InvalidRequest
from nanoinfer.options import NoOp, check_choice, check_flag, check_integer, check_number, check_text, checked_names

# vLLM's options that change nothing here, with the values that mean so; any other value is refused by name.
NO_OP: NoOp = {
    "runner": ("auto", "generate"),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "trust_remote_code": (False,),
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "quantization": (None,),
    "kv_cache_dtype": ("auto",),
    "swap_space": (0, 4),
    "cpu_offload_gb": (0, 0.0),
    "enable_chunked_prefill": (None, True),
    "scheduling_policy": ("fcfs",),
    "disable_log_stats": (True, False),
    "enable_lora": (False,),
    "enable_sleep_mode": (False,),
    "disable_custom_all_reduce": (False, True),
    "distributed_executor_backend": (None, "uni"),
    "hf_overrides": (None,),
    "compilation_config": (None,),
    "speculative_config": (None,),
    "generation_config": ("auto",),
    "max_seq_len_to_capture": (None,),
    "convert": ("auto", "none"),
    "model_impl": ("auto",),
    "nnodes": (1,),
    "node_rank": (0,),
    "logits_processors": (None, []),
    "served_model_name": (None,),
    "download_dir": (None,),
    "hf_token": (None, False),
    "enable_expert_parallel": (False,),
    "enable_prompt_embeds": (False,),
    "limit_mm_per_prompt": (None, {}),
    "code_revision": (None,),
    "config_format": ("auto",),
    "quantization_param_path": (None,),
    "disable_cascade_attn": (False, True),
    "language_model_only": (False,),
    "logprobs_mode": ("raw_logprobs",),
    "max_loras": (1,),
    "max_lora_rank": (16,),
    "override_generation_config": (None, {}),
    "stream_interval": (1,),
    **dict.fromkeys(
        ("chat_template", "mm_processor_kwargs", "pooler_config", "structured_outputs_config", "profiler_config",
         "attention_config", "attention_backend", "quantization_config", "spec_method", "spec_model", "spec_tokens"),
        (None,),
    ),
}  # fmt: skip
DTYPES = {**CHECKPOINT_DTYPES, "float": torch.float32, "half": torch.float16}
LOAD_FORMATS = ("auto", "safetensors", "dummy")


@dataclass(frozen=True)
class EngineConfig:
    """Options of LLM and LLMEngine. Wrong values raise InvalidRequest, unknown names TypeError."""

    model: str  # a folder, or a name on the Hugging Face hub
    tokenizer: str | None = None  # a folder or name; None: the model's
    skip_tokenizer_init: bool = False  # token ids in, token ids out
    revision: str | None = None  # of the model on the hub
    load_format: str = "auto"  # "auto" and "safetensors" read the checkpoint, "dummy" makes random weights
    dtype: str | torch.dtype = "auto"  # "auto": the checkpoint's
    device: str = "auto"  # "auto": cuda where there is one
    seed: int = 0  # of requests that name none
    max_model_len: int | None = None  # tokens of one request; None: the model's; -1: what the KV pool can hold
    max_num_seqs: int = 256  # requests that run at once
    max_num_batched_tokens: int | None = None  # tokens of one step; None: 2048 on a CPU, 16384 on a GPU
    block_size: int | None = None  # tokens of one KV block; None: 16
    num_gpu_blocks_override: int | None = None  # size of the KV pool in blocks, on any device
    kv_cache_memory_bytes: int | None = None  # size of the KV pool in bytes, on any device
    gpu_memory_utilization: float = 0.92  # share of a GPU's memory that the engine may take
    enable_prefix_caching: bool | None = None  # None: on
    enforce_eager: bool = False  # no CUDA graphs
    max_logprobs: int = 20  # most that a request may ask for at each place; -1: any number
    async_scheduling: bool | None = None  # launch a step before the last one's tokens are read; None: on a GPU

    @classmethod
    def from_options(cls, model: str | Path, **options: object) -> "EngineConfig":
        """Check names first: an option of vLLM's that means nothing here must have a value that asks for nothing."""
        if not isinstance(model, (str, Path)) or not str(model):  # str() would look for a folder "None", or here
            raise InvalidRequest(f"model must be a folder, or a name on the Hugging Face Hub, got {model!r}")
        known = {field.name for field in fields(cls)}
        if isinstance(tokenizer := options.get("tokenizer"), Path):
            options["tokenizer"] = str(tokenizer)
        if options.get("max_model_len") == "auto":
            options["max_model_len"] = -1
        for name in ("seed", "max_num_seqs"):  # None is vLLM's word for its own default
            if options.get(name, 0) is None:
                del options[name]
        return cls(str(model), **checked_names("the engine", options, known, NO_OP))  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for field in ("tokenizer", "revision"):
            check_text(field, getattr(self, field))
        check_choice("load_format", self.load_format, LOAD_FORMATS)
        check_choice("dtype", self.dtype, ("auto", *DTYPES, *dict.fromkeys(DTYPES.values())))
        check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        check_number("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        for flag in ("skip_tokenizer_init", "enforce_eager"):
            check_flag(flag, getattr(self, flag))
        for flag in ("enable_prefix_caching", "async_scheduling"):
            check_choice(flag, getattr(self, flag), (None, True, False))
        self._check_sizes()
        self._check_device()

    def _check_sizes(self) -> None:
        check_integer("max_num_seqs", self.max_num_seqs, 1, 2**16)
        check_integer("max_logprobs", self.max_logprobs, -1, 2**31 - 1)
        if self.fixed_max_model_len is not None:
            check_integer("max_model_len", self.max_model_len, 2, 2**31 - 1)
        limits = {
            "max_num_batched_tokens": 2**20,
            "block_size": 4096,
            "num_gpu_blocks_override": 2**31 - 1,
            "kv_cache_memory_bytes": 2**50,
        }
        for field, limit in limits.items():
            if getattr(self, field) is not None:
                check_integer(field, getattr(self, field), 1, limit)
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise InvalidRequest(
                f"num_gpu_blocks_override = {self.num_gpu_blocks_override} and kv_cache_memory_bytes = "
                f"{self.kv_cache_memory_bytes} both size the KV pool: pass one"
            )
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            raise InvalidRequest(f"block_size must be a power of two, got {self.block_size}")

    def _check_device(self) -> None:
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InvalidRequest("device is 'cuda', but torch sees no CUDA device; 'cpu' and 'auto' work here")

    @property
    def fixed_max_model_len(self) -> int | None:
        """max_model_len where it names a length."""
        return None if self.max_model_len == -1 else self.max_model_len

    def resolve_device(self) -> torch.device:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.device == "auto" else self.device)

    def resolve_dtype(self, checkpoint: torch.dtype | None) -> torch.dtype:
        """The dtype to run in: as asked, else the checkpoint's, else float32."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        return (checkpoint or torch.float32) if self.dtype == "auto" else DTYPES[self.dtype]


class EngineArgs:
    """A model and its options, checked, to be handed on: `LLMEngine.from_engine_args(EngineArgs(model, seed=1))`."""

    def __init__(self, model: str | Path, **options: object) -> None:
        EngineConfig.from_options(model, **options)
        self.model, self.options = str(model), options


AsyncEngineArgs = EngineArgs  # vLLM has two, of the same options
