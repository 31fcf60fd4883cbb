"""What several tests need: random Hugging Face checkpoints, and a KV cache driven by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from nanoinfer import ops
from nanoinfer.batch import Batch
from nanoinfer.config import ModelConfig
from nanoinfer.row_state import FLAG_STORE, ROW_STATE_WIDTH

TINY = {
    "vocab_size": 199, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip


def save_checkpoint(path: Path, seed: int = 0, **options: Any) -> Qwen2ForCausalLM:
    """Save a Qwen2 with random weights, TINY but for `options`, as Hugging Face does; returns theirs (fp32, eager).

    Every tensor is random, biases and norms too, which Hugging Face's own initialisation leaves at 0 and 1.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**(TINY | options), attn_implementation="eager")).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(path)
    return model


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


class Cache:
    """A poisoned KV cache and a table of `rows` requests of up to `length` tokens, their blocks in random order."""

    def __init__(
        self, config: ModelConfig, rows: int, length: int, block_size: int = 4, dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ):  # fmt: skip
        per_row = -(-length // block_size)
        blocks = rows * per_row
        self.block_size = block_size
        shape = (config.num_layers, blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        self.device = device
        self.kv = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.row_state = torch.zeros(rows + 1, ROW_STATE_WIDTH, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(rows + 1, per_row, dtype=torch.int32, device=device)
        self.slot_tokens = torch.zeros(blocks * block_size, dtype=torch.int32, device=device)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.edits = [(row, i, order.pop()) for row in range(rows) for i in range(per_row)]

    def make_batch(self, chunks: list[tuple[int, int, list[int]]]) -> Batch:
        """The Batch of one step; a chunk is (row, first position, token ids). Two tokens and one chunk of padding."""
        tokens = [token for _, _, ids in chunks for token in ids]
        message = [(row, start, start + len(ids), FLAG_STORE) for row, start, ids in chunks]
        edits, self.edits = self.edits, []
        header = self._int32([0, len(edits), len(chunks), len(tokens)])
        num_tokens, num_chunks = len(tokens) + 2, len(chunks) + 1
        sizes = (num_tokens, num_tokens, num_tokens, num_chunks + 1, num_chunks, num_chunks, 1, 1)
        fields = [torch.empty(size, dtype=torch.int32, device=self.device) for size in sizes]
        ops.prepare_batch(
            header, self._int32([[0] * (1 + ROW_STATE_WIDTH)]), self._int32(edits or [(0, 0, 0)]),
            self._int32(message), self._int32(tokens), self.row_state, self.block_tables, self.slot_tokens, *fields,
            self.block_size,
        )  # fmt: skip
        return Batch(*fields, self.block_tables)

    def logits(self, model: Any, chunks: list[tuple[int, int, list[int]]]) -> list[Tensor]:
        """Run one step; for each chunk its logits at every token [n, vocab_size]."""
        hidden = model(self.make_batch(chunks), self.kv)
        sizes = [len(ids) for _, _, ids in chunks]
        return list(model.logits(hidden[: sum(sizes)]).split(sizes))

    def _int32(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
