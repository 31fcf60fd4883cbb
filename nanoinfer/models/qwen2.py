"""Qwen2 and Qwen2.5 (Qwen Team, 2024): how the layers are wired. Module paths are Hugging Face's."""

import torch
from torch import Tensor, nn

from nanoinfer.batch import Batch
from nanoinfer.config import ModelConfig
from nanoinfer.layers.attention import Attention
from nanoinfer.layers.embedding import LMHead, VocabEmbedding
from nanoinfer.layers.linear import GatedLinear, RowLinear
from nanoinfer.layers.norm import RMSNorm
from nanoinfer.layers.rotary import rope_table
from nanoinfer.utils.parallel import ALONE, TP


class Qwen2MLP(nn.Module):
    def __init__(self, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, tp: TP) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = GatedLinear(hidden, inner, "gate_proj", "up_proj", device=device, dtype=dtype, tp=tp)
        self.down_proj = RowLinear(inner, hidden, bias=False, device=device, dtype=dtype, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj(x))  # type: ignore[no-any-return]


class Qwen2Layer(nn.Module):
    """Attention, then MLP. The stream between layers is x + residual, kept apart so that each norm does the sum."""

    def __init__(self, config: ModelConfig, window: int, *, device: torch.device, dtype: torch.dtype, tp: TP) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, window, qkv_bias=True, device=device, dtype=dtype, tp=tp)
        self.mlp = Qwen2MLP(config, device=device, dtype=dtype, tp=tp)
        self.input_layernorm = RMSNorm(hidden, eps, device=device, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden, eps, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: Batch, kv: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> the same; residual is None before the first layer, then updated in place."""
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, batch, kv, rope)
        x = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Qwen2Model(nn.Module):
    def __init__(
        self, config: ModelConfig, *, max_length: int, device: torch.device, dtype: torch.dtype, tp: TP
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabEmbedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            Qwen2Layer(config, window, device=device, dtype=dtype, tp=tp) for window in config.windows
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        self.rope = nn.Buffer(rope_table(config.rope, config.head_dim, max_length, device), persistent=False)

    def forward(self, batch: Batch, kv: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(batch.tokens)
        residual: Tensor | None = None
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, batch, layer_kv, self.rope)
        assert residual is not None  # there is a layer
        return self.norm.add(x, residual)


class Qwen2ForCausalLM(nn.Module):
    """max_length: the positions it is ready for. Weights are unset until the loader fills them."""

    def __init__(
        self, config: ModelConfig, *, max_length: int, device: torch.device, dtype: torch.dtype, tp: TP = ALONE
    ) -> None:
        super().__init__()
        self.model = Qwen2Model(config, max_length=max_length, device=device, dtype=dtype, tp=tp)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, tied, device=device, dtype=dtype)

    def forward(self, batch: Batch, kv: Tensor) -> Tensor:
        """kv [layers, blocks, 2, Hkv, block_size, D], written in place. Hidden states [T, hidden], after the norm."""
        return self.model(batch, kv)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [L, hidden] -> [L, vocab_size] float32."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]
