"""ModelConfig: what config.json and generation_config.json say of a model, checked; nothing else reads these files."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanoinfer.errors import ModelLoadError
from nanoinfer.utils.json_fields import Fields

# Ten times the largest published models. Beyond it the file is broken, and must not get as far as an allocation.
LIMITS = {
    "vocab_size": 2**23,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**11,
    "num_attention_heads": 2**11,
    "max_position_embeddings": 2**24,
}
HEAD_DIMS = (32, 64, 96, 128, 256)
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: the base and how a type stretches it to longer texts, defaults as Hugging Face's."""

    type: str  # one of ROPE_TYPES
    theta: float
    original_length: int  # positions before stretching
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults of generation_config.json; None where it says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model's shape."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: torch.dtype | None  # of the checkpoint, where config.json names it
    windows: tuple[int, ...]  # a layer attends to its last so many positions; 0: to all
    eos_token_ids: tuple[int, ...]
    generation: GenerationDefaults
    max_model_len: int | None = None  # tokens of one request of the engine that runs it

    @property
    def max_length(self) -> int:
        """Positions the model is made for.

        YaRN's are its original ones times its factor where that is more: Qwen2.5's own instructions add `rope_scaling`
        and leave max_position_embeddings. "dynamic" gets no more than max_position_embeddings: beyond it, its
        frequencies depend on the longest text seen before, so equal prompts would get unequal results.
        """
        if self.rope.type == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_length * self.rope.factor))
        return self.max_position_embeddings

    @classmethod
    def from_dir(cls, path: Path, supported: Collection[str] | None = None) -> "ModelConfig":
        """Read a model folder's config.json, as transformers 4 or 5 wrote it, and generation_config.json if there.

        supported: the architectures to accept; None: any that has the fields. Raises ModelLoadError, naming field,
        value and what was expected.
        """
        if not path.is_dir():
            raise ModelLoadError(f"{path} is {'a file' if path.exists() else 'missing'}, expected a model folder")
        config = Fields.read(path / "config.json")
        generation = path / "generation_config.json"
        return _parse(config, Fields.read(generation) if generation.exists() else Fields(generation, {}), supported)


def check_architecture(name: str, supported: Collection[str]) -> None:
    """Raise ModelLoadError, listing what is supported, where `name` is not."""
    if name not in supported:
        raise ModelLoadError(f"architecture {name!r} is not supported; supported: {', '.join(sorted(supported))}")


def _parse(config: Fields, generation: Fields, supported: Collection[str] | None) -> ModelConfig:
    architecture = _architecture(config, supported)
    sizes = {name: config.integer(name, 1, high) for name, high in LIMITS.items()}
    hidden, heads, length = sizes["hidden_size"], sizes["num_attention_heads"], sizes["max_position_embeddings"]
    kv_heads = config.integer("num_key_value_heads", 1, heads, default=heads)
    if heads % kv_heads:
        raise config.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if config.values.get("hidden_act", "silu") != "silu":
        raise config.refuse("hidden_act", "'silu'")
    return ModelConfig(
        architecture=architecture,
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(config, hidden, heads),
        rms_norm_eps=config.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope=_rope(config, length),
        max_position_embeddings=length,
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        dtype=_dtype(config),
        windows=_windows(config, sizes["num_hidden_layers"]),
        eos_token_ids=_eos(generation if generation.has("eos_token_id") else config, sizes["vocab_size"]),
        generation=_generation(generation),
    )


def _architecture(config: Fields, supported: Collection[str] | None) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.refuse("architectures", "a list of one name")
    if supported is not None:
        check_architecture(names[0], supported)
    for name, why in (("quantization_config", "weights are not quantised"), ("auto_map", "no code comes with a model")):
        if config.has(name):
            raise config.refuse(name, f"none: {why} here")
    return names[0]


def _head_dim(config: Fields, hidden: int, heads: int) -> int:
    if not config.has("head_dim") and hidden % heads:
        raise config.refuse("hidden_size", f"a multiple of num_attention_heads, {heads}, where head_dim is not given")
    head_dim = config.integer("head_dim", 1, 2**16, default=hidden // heads)
    if head_dim not in HEAD_DIMS:
        raise ModelLoadError(f"{config.path}: head_dim is {head_dim}, expected one of {HEAD_DIMS}")
    return head_dim


def _dtype(config: Fields) -> torch.dtype | None:
    name = "dtype" if config.has("dtype") else "torch_dtype"
    value = config.values.get(name)
    if value is not None and (not isinstance(value, str) or value not in DTYPES):
        raise config.refuse(name, f"one of {', '.join(DTYPES)}")
    return None if value is None else DTYPES[value]


def _windows(config: Fields, layers: int) -> tuple[int, ...]:
    """Each layer's attention window, from layer_types (transformers 5) or use_sliding_window and max_window_layers."""
    types = config.values.get("layer_types")
    sliding = config.flag("use_sliding_window", default=False)
    if types is None:
        first = config.integer("max_window_layers", 0, 2**31 - 1, default=28)
        types = ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise config.refuse("layer_types", f"a list of {layers}, num_hidden_layers")
    if unknown := [t for t in types if t not in ("full_attention", "sliding_attention")]:
        raise config.refuse("layer_types", f"full_attention or sliding_attention, not {unknown[0]!r}")
    if "sliding_attention" not in types:
        return (0,) * layers
    if not sliding:
        raise config.refuse("use_sliding_window", "true, since layer_types has sliding_attention")
    window = config.integer("sliding_window", 1, 2**31 - 1)
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def _rope(config: Fields, length: int) -> RopeConfig:
    """RoPE from rope_parameters (transformers 5) or rope_theta and rope_scaling (4)."""
    sections = [section for name in ("rope_parameters", "rope_scaling") if (section := config.section(name))]
    found = {_rope_section(config, section, length) for section in sections or [Fields(config.path, {})]}
    if len(found) > 1:
        raise config.refuse("rope_scaling", "the same as rope_parameters, or only one of the two")
    return found.pop()


def _rope_section(config: Fields, rope: Fields, length: int) -> RopeConfig:
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ModelLoadError(f"{config.path}: RoPE type is {kind!r}, expected one of {', '.join(ROPE_TYPES)}")
    for name, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.refuse(name, "RoPE parameters common to all layers")
    for owner in (config, rope):
        owner.number("partial_rotary_factor", 1.0, 1.0, default=1.0)
    theta = rope if rope.has("rope_theta") else config
    made: dict[str, Any] = {"type": kind, "theta": theta.number("rope_theta", 2.0, 1e12, default=1e4)}
    owner = config if config.has("original_max_position_embeddings") else rope
    original = owner.integer("original_max_position_embeddings", 1, LIMITS["max_position_embeddings"], default=length)
    if kind not in ("llama3", "yarn"):
        original = length
    if kind != "default":
        made["factor"] = rope.number("factor", 1.0, LIMITS["max_position_embeddings"] / original)
    if kind == "llama3":
        made["low_freq_factor"] = rope.number("low_freq_factor", 1e-3, 1e6)
        made["high_freq_factor"] = rope.number("high_freq_factor", made["low_freq_factor"] + 1e-3, 1e6)
    if kind == "yarn":
        made |= _yarn(rope, made["factor"])
    return RopeConfig(original_length=original, **made)


def _yarn(rope: Fields, factor: float) -> dict[str, Any]:
    """YaRN's own parameters (Peng et al., 2023). attention_factor scales cosines and sines, hence q and k both."""
    mscale, mscale_all = (rope.number(name, 0.0, 1e3, default=0.0) for name in ("mscale", "mscale_all_dim"))
    inferred = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor, 1.0)
    return {
        "beta_fast": rope.number("beta_fast", 0.0, 1e6, default=0.0) or 32.0,
        "beta_slow": rope.number("beta_slow", 0.0, 1e6, default=0.0) or 1.0,
        "truncate": rope.flag("truncate", default=True),
        "attention_factor": rope.number("attention_factor", 1e-3, 1e3, default=inferred),
    }


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0


def _eos(owner: Fields, vocab_size: int) -> tuple[int, ...]:
    value = owner.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        raise owner.refuse("eos_token_id", f"ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _generation(fields: Fields) -> GenerationDefaults:
    """Within the ranges of SamplingParams: what is refused here would otherwise be when the first request comes."""

    def number(name: str, low: float, high: float) -> float | None:
        return fields.number(name, low, high) if fields.has(name) else None

    def integer(name: str, low: int) -> int | None:
        return fields.integer(name, low, 2**31 - 1) if fields.has(name) else None

    temperature = number("temperature", 0.0, 2.0)
    return GenerationDefaults(
        temperature=temperature if fields.flag("do_sample", default=True) else 0.0,
        top_k=integer("top_k", -1),
        top_p=number("top_p", 1e-6, 1.0),
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 1e-6, 1e4),
        max_new_tokens=integer("max_new_tokens", 1),
        presence_penalty=number("presence_penalty", -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", -2.0, 2.0),
    )
