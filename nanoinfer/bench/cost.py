"""What a model's tokens cost, whatever the engine: bytes to read and arithmetic to do, hence the shortest time."""

from dataclasses import dataclass

import torch

from nanoinfer.bench.machine import Limits
from nanoinfer.bench.workload import Workload
from nanoinfer.config import ModelConfig
from nanoinfer.models import MODELS


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Of one model in one dtype."""

    total_bytes: int  # all weights
    step_bytes: int  # weights that every step reads: all but an embedding that is not lm_head as well
    kv_bytes: int  # K and V of one token
    token_flops: int  # the layers' matrices, for one token
    head_flops: int  # lm_head, for one sampled token
    pair_flops: int  # attention of one token to one token

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype) -> "ModelCost":
        meta = torch.device("meta")
        model = MODELS[config.architecture](config, device=meta, dtype=dtype, max_length=1)
        count = sum(parameter.numel() for parameter in model.parameters())
        table, size = config.vocab_size * config.hidden_size, dtype.itemsize
        read = count if config.tie_word_embeddings else count - table
        return cls(
            total_bytes=count * size,
            step_bytes=read * size,
            kv_bytes=2 * config.num_layers * config.num_kv_heads * config.head_dim * size,
            token_flops=2 * (read - table),
            head_flops=2 * table,
            pair_flops=4 * config.num_layers * config.num_heads * config.head_dim,
        )

    def decode_seconds(self, batch: int, context: float, limits: Limits) -> float:
        """A step that gives each of `batch` sequences of `context` tokens its next one."""
        flops = batch * (self.token_flops + self.head_flops + self.pair_flops * context)
        return limits.seconds(self.step_bytes + self.kv_bytes * batch * context, flops)

    def prefill_seconds(self, lengths: list[int], limits: Limits) -> float:
        """Prompts of these lengths, all in one step, and the first token of each."""
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        flops = self.token_flops * sum(lengths) + self.head_flops * len(lengths) + self.pair_flops * pairs
        return limits.seconds(self.step_bytes, flops)

    def workload_seconds(self, workload: Workload, limits: Limits) -> float:
        """All prompts in one step, then every request decodes at once until its end: no schedule can be faster."""
        lengths = [len(prompt) for prompt in workload.prompts]
        seconds = self.prefill_seconds(lengths, limits)
        for step in range(1, max(workload.output_lens)):
            ends = zip(lengths, workload.output_lens, strict=True)
            contexts = [length + step for length, output in ends if output > step]
            seconds += self.decode_seconds(len(contexts), sum(contexts) / len(contexts), limits)
        return seconds
