"""Batch: every tensor of one step, made by `ops.prepare_batch`, complete and frozen when the model sees it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step of T tokens in R chunks, L of which want a next token. All tensors are int32 on one device.

    Entries past the step's real counts are padding: slot -1, an empty chunk of length 0, and the table's last
    row, which belongs to no request.
    """

    tokens: Tensor  # [T] token ids
    positions: Tensor  # [T] position of each token in its sequence
    slots: Tensor  # [T] where its K and V go: block * block_size + offset; -1: nowhere
    q_starts: Tensor  # [R + 1] chunk r holds tokens q_starts[r] to q_starts[r + 1]
    kv_lens: Tensor  # [R] tokens the chunk's last token attends to, itself included
    rows: Tensor  # [R] the chunk's row in the table of requests
    logit_rows: Tensor  # [L] index into T: tokens whose logits are wanted
    sample_rows: Tensor  # [L] the table row that each of them belongs to
    block_tables: Tensor  # [table rows, blocks per sequence] KV block of each block_size positions of a row
