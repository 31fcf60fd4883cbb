"""The model to measure: a checkpoint, or a real model's shape with random weights. Light to import."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nanoinfer.config import ModelConfig

DEMO = Path(__file__).parents[1] / "assets" / "demo"

# Qwen2.5: hidden, MLP, layers, query heads, KV heads, vocabulary, whether lm_head is the embedding.
SHAPES = {
    "qwen2-0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2-7b": (3584, 18_944, 28, 28, 4, 152_064, False),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A model folder and how to run it. dummy: the folder holds a config alone, the weights are random."""

    name: str
    folder: str
    dummy: bool
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32", "float16" or "bfloat16"

    def model_config(self) -> "ModelConfig":
        from nanoinfer.config import ModelConfig

        return ModelConfig.from_dir(Path(self.folder))

    def torch_dtype(self) -> "torch.dtype":
        from nanoinfer.config import DTYPES

        return DTYPES[self.dtype]


def config_json(shape: str, dtype: str) -> dict[str, object]:
    """config.json of a Qwen2.5 model, in the form that every engine reads (transformers 4's names)."""
    hidden, inner, layers, heads, kv_heads, vocab, tied = SHAPES[shape]
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": dtype, "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False,
        "initializer_range": 0.02,
    }  # fmt: skip


@contextmanager
def open_target(model: str | None, shape: str | None, device: str, dtype: str) -> Iterator[Target]:
    """The model named (a folder, a name on the hub, None for the demo model), or one of SHAPES in a temporary folder.

    "auto" stands for CUDA where there is one, and for the checkpoint's dtype (bfloat16 for a shape).
    """
    if shape is None:
        from nanoinfer.utils.hub import resolve_model

        yield _resolve(Path(model).name if model else "demo", resolve_model(model or DEMO), False, device, dtype)
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json(shape, "bfloat16")))
        yield _resolve(shape, Path(folder), True, device, dtype)


def _resolve(name: str, folder: Path, dummy: bool, device: str, dtype: str) -> Target:
    from nanoinfer.config import ModelConfig
    from nanoinfer.engine_config import EngineConfig

    config = EngineConfig(str(folder), device=device, dtype=dtype)
    chosen = config.resolve_dtype(ModelConfig.from_dir(folder).dtype)
    return Target(name, str(folder), dummy, config.resolve_device().type, str(chosen).removeprefix("torch."))
