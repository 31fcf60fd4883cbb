"""Grouped-query attention over the paged KV cache (Ainslie et al., 2023; vLLM, Kwon et al., 2023)."""

import torch
from torch import Tensor, nn

from nanoinfer import ops
from nanoinfer.batch import Batch
from nanoinfer.config import ModelConfig
from nanoinfer.layers.linear import MergedColumnLinear, RowLinear
from nanoinfer.utils.parallel import TP


class Attention(nn.Module):
    """Self-attention with rotary positions. window: positions a token attends to, 0 for all before it.

    Ranks share the heads. A rank without a KV head of its own is refused; copies of one would be needed.
    """

    def __init__(
        self, config: ModelConfig, window: int, *, qkv_bias: bool, device: torch.device, dtype: torch.dtype, tp: TP
    ) -> None:
        super().__init__()
        # Refuses what ranks cannot share; how many heads there are here, weight and kv say.
        tp.split(config.num_heads, "attention heads")
        tp.split(config.num_kv_heads, "KV heads")
        self.window, self.scale = window, config.head_dim**-0.5
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = MergedColumnLinear(config.hidden_size, parts, bias=qkv_bias, device=device, dtype=dtype, tp=tp)
        self.o_proj = RowLinear(q_size, config.hidden_size, bias=False, device=device, dtype=dtype, tp=tp)

    def forward(self, x: Tensor, batch: Batch, kv: Tensor, rope: Tensor) -> Tensor:
        """x [T, hidden]; kv [blocks, 2, Hkv, block_size, D], this layer's; rope: see `rope_table`. -> [T, hidden]."""
        q = ops.qkv(x, self.qkv_proj.weight, self.qkv_proj.bias, kv, batch.positions, batch.slots, rope)
        # The batch's writer had ended before this layer began: the embedding between them is torch's kernel, and
        # those start when all before them have ended.
        out = ops.paged_attention(
            q, kv, batch.q_starts, batch.kv_lens, batch.rows, batch.block_tables, self.scale, self.window,
            tables_ready=True,
        )  # fmt: skip
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]
