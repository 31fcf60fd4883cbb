"""From hidden states to the next tokens."""

from typing import Protocol

from torch import Tensor

from nanoinfer import ops
from nanoinfer.batch import Batch

# Rows of logits in memory at once: 64 rows of 151,936 float32 are 39 MB.
LOGIT_ROWS = 64


class HasLogits(Protocol):
    def logits(self, hidden: Tensor) -> Tensor: ...


def sample_tokens(
    model: HasLogits, hidden: Tensor, batch: Batch, row_state: Tensor, slot_tokens: Tensor, tokens: Tensor,
    *, vocab_size: int, block_size: int, penalties: bool,
) -> None:  # fmt: skip
    """Write the next token of each of batch's L sampled rows to tokens [L] int32, and advance row_state by it.

    hidden [T, D]. `penalties` says that some row of the step asks for one.
    """
    for begin in range(0, tokens.shape[0], LOGIT_ROWS):
        part = slice(begin, begin + LOGIT_ROWS)
        logits = model.logits(hidden[batch.logit_rows[part]])
        rows = batch.sample_rows[part]
        if penalties:
            ops.penalize(logits, rows, row_state, batch.block_tables, slot_tokens, block_size)
        ops.sample(logits, rows, row_state, tokens[part], vocab_size)
