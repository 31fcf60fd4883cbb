"""Layers: RoPE tables against Hugging Face's, and how linear layers are cut over ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from nanoinfer.bench.target import DEMO
from nanoinfer.config import ROPE_TYPES, ModelConfig
from nanoinfer.errors import ModelLoadError
from nanoinfer.layers.attention import Attention
from nanoinfer.layers.embedding import LMHead, VocabEmbedding
from nanoinfer.layers.linear import ColumnLinear, MergedColumnLinear, RowLinear
from nanoinfer.layers.norm import RMSNorm
from nanoinfer.layers.rotary import FREQUENCIES, rope_table
from nanoinfer.utils.parallel import TP

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "default", "rope_theta": 10000},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 4096, "mscale": 0.7,
     "mscale_all_dim": 1.3, "beta_fast": 24, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 16384,
     "attention_factor": 0.9},
]  # fmt: skip
ON_CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float64}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_table(tmp_path: Path, rope: dict[str, Any], head_dim: int) -> None:
    """Cosines and sines are Hugging Face's to the last bits at every position up to 32k, for every RoPE type."""
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = Qwen2Config(**sizes, rope_parameters=dict(rope), architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(tmp_path)
    length = 32768
    cos, sin = Qwen2RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    table = rope_table(ModelConfig.from_dir(tmp_path).rope, head_dim, length, torch.device("cpu"))
    assert (table.shape, table.dtype) == ((length, head_dim), torch.float32)
    expected = torch.cat((cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]), dim=1)
    torch.testing.assert_close(table, expected, rtol=0, atol=3e-7)


def test_rope_types() -> None:
    """Each RoPE type that a config may name has frequencies, and is compared above."""
    assert set(FREQUENCIES) == set(ROPE_TYPES) == {rope["rope_type"] for rope in ROPES}


def randomize(*layers: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)


def cut(whole: torch.nn.Module, part: torch.nn.Module, tp: TP) -> None:
    """Fill rank `part` from `whole` by what the layer class says."""
    for ours, theirs in zip(part.sources("m.layer"), whole.sources("m.layer"), strict=True):
        assert ours.name == theirs.name
        pieces = [theirs.target] * tp.size if ours.shard_dim is None else theirs.target.chunk(tp.size, ours.shard_dim)
        ours.target.copy_(pieces[tp.rank])


@pytest.mark.parametrize("size", [2, 4])
def test_column_then_row(size: int) -> None:
    """Ranks' gate and up columns, then rows, sum to the whole: biases are cut with columns, added once with rows."""
    parts = {"a": 8, "b": 16}

    def layers(tp: TP) -> tuple[MergedColumnLinear, RowLinear]:
        first = MergedColumnLinear(12, parts, bias=True, tp=tp, **ON_CPU)
        return first, RowLinear(24, 10, bias=True, tp=tp, **ON_CPU)

    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = layers(TP())
    randomize(*whole)
    a, b = whole[0](x).split([8, 16], dim=1)
    expected = whole[1](torch.cat((a, b), dim=1))
    total = torch.zeros_like(expected)
    for rank in range(size):
        tp = TP(rank, size)
        first, second = layers(tp)
        cut(whole[0], first, tp)
        torch.testing.assert_close(first(x), torch.cat((a.chunk(size, 1)[rank], b.chunk(size, 1)[rank]), dim=1))
        # Rows meet columns of another order, part by part, when a rank holds several parts: cut them likewise.
        rows = torch.cat([p.chunk(size, 1)[rank] for p in whole[1].weight.split([8, 16], dim=1)], dim=1)
        second.weight.copy_(rows)
        second.bias.copy_(whole[1].bias)
        second.tp = TP(rank)  # alone, so that its part of the sum comes back
        total += second(first(x))
    torch.testing.assert_close(total, expected)


def test_cut_rows() -> None:
    """A RowLinear cut by its own description: parts of the input give parts of the sum."""
    whole = RowLinear(24, 10, bias=True, tp=TP(), **ON_CPU)
    randomize(whole)
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(5, 10, dtype=torch.float64)
    for rank in range(3):
        part = RowLinear(24, 10, bias=True, tp=TP(rank, 3), **ON_CPU)
        cut(whole, part, TP(rank, 3))
        part.tp = TP(rank)
        total += part(x.chunk(3, 1)[rank])
    torch.testing.assert_close(total, whole(x))


def test_whole_heads_alone_are_shared() -> None:
    """Two KV heads of 128 numbers are not split over four ranks, though their 256 outputs could be."""
    demo = ModelConfig.from_dir(DEMO)
    for heads, kv_heads, what in ((4, 2, "2 KV heads"), (6, 4, "6 attention heads")):
        config = replace(demo, num_heads=heads, num_kv_heads=kv_heads, head_dim=128)
        with pytest.raises(ModelLoadError, match=f"{what} cannot be split over 4 ranks"):
            Attention(config, 0, qkv_bias=True, tp=TP(1, 4), **ON_CPU)


def test_split_refuses() -> None:
    """Heads or features that do not divide are refused, with both numbers."""
    with pytest.raises(ModelLoadError, match="14 attention heads cannot be split over 4 ranks"):
        TP(0, 4).split(14, "attention heads")
    with pytest.raises(ModelLoadError, match="6 outputs of k_proj cannot be split over 4 ranks"):
        MergedColumnLinear(8, {"q_proj": 8, "k_proj": 6}, bias=False, tp=TP(1, 4), **ON_CPU)
    with pytest.raises(ModelLoadError, match="9 output features cannot be split over 2 ranks"):
        ColumnLinear(8, 9, bias=False, tp=TP(1, 2), **ON_CPU)
    with pytest.raises(ModelLoadError, match="9 input features cannot be split over 2 ranks"):
        RowLinear(9, 8, bias=False, tp=TP(1, 2), **ON_CPU)


def test_norm_add() -> None:
    """`add` is the norm of the sum and leaves the sum in the residual."""
    norm = RMSNorm(16, 1e-6, device=torch.device("cpu"), dtype=torch.float32)
    randomize(norm)
    x, residual = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)).unbind()
    total = x + residual
    torch.testing.assert_close(norm.add(x, residual), torch.nn.functional.rms_norm(total, (16,), norm.weight, 1e-6))
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(norm(total), torch.nn.functional.rms_norm(total, (16,), norm.weight, 1e-6))


def test_embedding_and_head() -> None:
    """A tied head uses the embedding's own weight, and logits are float32 whatever the weights are."""
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    embedding = VocabEmbedding(11, 8, **options)
    randomize(embedding)
    head = LMHead(11, 8, embedding, **options)
    tokens = torch.tensor([3, 10, 0], dtype=torch.int32)
    hidden = embedding(tokens)
    assert torch.equal(hidden, embedding.weight[tokens.long()])
    assert head.weight is embedding.weight
    assert head(hidden).dtype == torch.float32
    assert LMHead(11, 8, None, **options).weight.shape == (11, 8)
