"""Every op in plain torch: the specification, the fallback where no kernel is built, and the tests' ground truth.

Inner arithmetic is float32, or float64 when the inputs are: tests call these with float64 inputs. Loops go over
sequences in Python, so they are slow and easy to check by eye.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoinfer.row_state import (
    FLAG_SAMPLE,
    FLAG_STORE,
    FREQUENCY_PENALTY,
    LAST_TOKEN,
    LENGTH,
    MIN_P,
    PRESENCE_PENALTY,
    PROMPT_LENGTH,
    REPETITION_PENALTY,
    SEED_HI,
    SEED_LO,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)

# Ids that `_find_largest` compares by their largest before it orders any: ordering alone reads a row several times.
TILE = 32


def _wide(x: Tensor) -> Tensor:
    """x in the type that inner arithmetic uses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def prepare_batch(
    header: Tensor, new_rows: Tensor, edits: Tensor, chunks: Tensor, new_tokens: Tensor,
    row_state: Tensor, block_tables: Tensor, slot_tokens: Tensor,
    tokens: Tensor, positions: Tensor, slots: Tensor, q_starts: Tensor, kv_lens: Tensor, rows: Tensor,
    logit_rows: Tensor, sample_rows: Tensor, block_size: int,
) -> None:  # fmt: skip
    num_new, num_edits, num_chunks, num_tokens = header.tolist()
    new, edit = new_rows[:num_new].long(), edits[:num_edits].long()
    row_state[new[:, 0]] = new_rows[:num_new, 1:]
    block_tables[edit[:, 0], edit[:, 1]] = edits[:num_edits, 2]
    _pad(tokens, positions, slots, q_starts, kv_lens, rows, logit_rows, sample_rows, num_tokens, row_state.shape[0] - 1)
    begin, num_logits = 0, 0
    for r, (row, start, end, flags) in enumerate(chunks[:num_chunks].tolist()):
        stop = begin + end - start
        pos = torch.arange(start, end, dtype=torch.int32, device=tokens.device)
        given = new_tokens[begin:stop]
        tokens[begin:stop] = torch.where(given < 0, row_state[row, LAST_TOKEN], given)
        positions[begin:stop] = pos
        if flags & FLAG_STORE:
            at = block_tables[row, (pos // block_size).long()] * block_size + pos % block_size
            slots[begin:stop] = at
            slot_tokens[at.long()] = tokens[begin:stop]
        q_starts[r], kv_lens[r], rows[r] = begin, end, row
        row_state[row, LENGTH] = end
        if flags & FLAG_SAMPLE:
            logit_rows[num_logits], sample_rows[num_logits] = stop - 1, row
            num_logits += 1
        begin = stop


def _pad(
    tokens: Tensor, positions: Tensor, slots: Tensor, q_starts: Tensor, kv_lens: Tensor, rows: Tensor,
    logit_rows: Tensor, sample_rows: Tensor, num_tokens: int, scratch_row: int,
) -> None:  # fmt: skip
    for out, value in (
        (tokens, 0), (positions, 0), (slots, -1), (q_starts, num_tokens), (kv_lens, 0), (rows, scratch_row),
        (logit_rows, 0), (sample_rows, scratch_row),
    ):  # fmt: skip
        out.fill_(value)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual.copy_(_wide(residual) + _wide(x))
    return rms_norm(residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = _wide(x).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def rotary(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    half = cos_sin.shape[1] // 2
    angle = cos_sin[positions.long()].to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(1)
    cos, sin = angle[..., :half], angle[..., half:]
    part = x[..., : 2 * half]
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    a, b = _wide(first), _wide(second)
    rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
    first.copy_(rotated_a)
    second.copy_(rotated_b)


def store_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    block_size = kv.shape[3]
    keep = slots >= 0
    at = slots[keep].long()
    kv[at // block_size, 0, :, at % block_size] = k[keep]
    kv[at // block_size, 1, :, at % block_size] = v[keep]


def rotary_store_kv(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor, interleaved: bool
) -> None:
    rotary(q, positions, cos_sin, interleaved)
    rotated = k.clone()
    rotary(rotated, positions, cos_sin, interleaved)
    store_kv(rotated, v, kv, slots)


def paged_attention(
    q: Tensor, kv: Tensor, q_starts: Tensor, kv_lens: Tensor, rows: Tensor, block_tables: Tensor,
    scale: float, window: int, tables_ready: bool = False,
) -> Tensor:  # fmt: skip
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts = q_starts.tolist()
    for r, (kv_len, row) in enumerate(zip(kv_lens.tolist(), rows.tolist(), strict=True)):
        begin, end = starts[r], starts[r + 1]
        if end > begin:
            blocks = block_tables[row, : -(-kv_len // kv.shape[3])].long()
            k, v = kv[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :kv_len]
            out[begin:end] = _attend(q[begin:end], k, v, scale, window)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Causal attention of the last n of kv_len positions. q [n, Hq, D]; k, v [Hkv, kv_len, D]."""
    n, kv_len, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[0]
    k, v = (_wide(t).repeat_interleave(group, dim=0) for t in (k, v))
    query = torch.arange(kv_len - n, kv_len, device=q.device)[:, None]
    key = torch.arange(kv_len, device=q.device)[None, :]
    seen = (key <= query) & (key > query - window) if window else key <= query
    scores = (_wide(q).transpose(0, 1) @ k.transpose(1, 2)) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).to(q.dtype)


def thin_linear(x: Tensor, weight: Tensor, bias: Tensor | None, float_out: bool) -> Tensor:
    out = F.linear(_wide(x), _wide(weight), None if bias is None else _wide(bias))
    return out if float_out else out.to(x.dtype)


def thin_gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    return silu_and_mul(thin_linear(x, weight, None, False))


def thin_qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, kv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor
) -> Tensor:
    heads: Tensor = thin_linear(x, weight, bias, False).unflatten(1, (-1, kv.shape[4]))
    q, k, v = heads.tensor_split((heads.shape[1] - 2 * kv.shape[2], heads.shape[1] - kv.shape[2]), dim=1)
    rotary_store_kv(q, k, v, kv, positions, slots, cos_sin, False)
    return q.contiguous()


def tile_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, cols: int, tiles: int, split: int, blocks: int
) -> Tensor:
    wide = thin_linear(x, weight, bias, True)
    return (silu_and_mul(wide) if gated else wide).to(x.dtype)


def tall_gated_linear(x: Tensor, weight: Tensor, cols: int, down: int, across: int, band: int) -> Tensor:
    return thin_gated_linear(x, weight)


def penalize(
    logits: Tensor, sample_rows: Tensor, row_state: Tensor, block_tables: Tensor, slot_tokens: Tensor, block_size: int
) -> None:
    columns = [REPETITION_PENALTY, PRESENCE_PENALTY, FREQUENCY_PENALTY]
    for i, row in enumerate(sample_rows.tolist()):
        repetition, presence, frequency = row_state.view(torch.float32)[row, columns].tolist()
        if row == row_state.shape[0] - 1 or (repetition, presence, frequency) == (1, 0, 0):
            continue
        pos = torch.arange(int(row_state[row, LENGTH]), device=logits.device)
        at = block_tables[row, pos // block_size].long() * block_size + pos % block_size
        ids = slot_tokens[at].long()
        seen = ids.unique()
        picked = logits[i, seen]
        logits[i, seen] = torch.where(picked > 0, picked / repetition, picked * repetition)
        output, counts = ids[int(row_state[row, PROMPT_LENGTH]) :].unique(return_counts=True)
        logits[i, output] -= frequency * counts.to(logits.dtype) + presence


def sample(logits: Tensor, sample_rows: Tensor, row_state: Tensor, tokens: Tensor, vocab_size: int) -> None:
    scratch_row = row_state.shape[0] - 1
    floats = row_state.view(torch.float32)
    for i, row in enumerate(sample_rows.tolist()):
        tokens[i] = -1
        if row == scratch_row:
            continue
        state, params = row_state[row].tolist(), floats[row].tolist()
        picked = _pick(logits[i, :vocab_size].double(), state, params)
        tokens[i] = picked
        row_state[row, LAST_TOKEN] = max(picked, 0)
        row_state[row, LENGTH] = state[LENGTH] + 1


def _pick(logits: Tensor, state: list[int], params: list[float]) -> int:
    if not torch.isfinite(logits.max()):  # max is NaN where any logit is
        return -1
    if params[TEMPERATURE] == 0:
        return int(logits.argmax())
    weight = keep_weights(logits / params[TEMPERATURE], state[TOP_K], params[TOP_P], params[MIN_P])
    below = weight.cumsum(0)
    u = uniform(state[SEED_LO], state[SEED_HI], state[LENGTH])
    # The first id whose cumulative weight passes u; the clamp covers u * total rounding up to the total.
    index = int(torch.searchsorted(below, u * float(below[-1]), right=True))
    return min(index, int(weight.nonzero().max()))


def keep_weights(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Unnormalised probabilities [V] of the ids that min_p, top_k, then top_p keep; 0 for the others.

    Equal logits are kept or dropped together: each filter is a threshold, so the kept set depends neither on the
    order of ids nor on a sort's.
    """
    weight = (scaled - scaled.max()).exp()
    weight = torch.where(weight >= min_p, weight, 0.0)
    if 0 < top_k < weight.numel():
        weight = torch.where(weight >= weight.topk(top_k).values[-1], weight, 0.0)
    if top_p < 1:
        ordered = weight.sort(descending=True).values
        reached = ordered.cumsum(0) >= top_p * ordered.sum()
        # argmax finds the first place where the mass reaches top_p: that token is kept as well.
        weight = torch.where(weight >= ordered[reached.int().argmax()], weight, 0.0)
    return weight


def uniform(seed_lo: int, seed_hi: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, from (seed, position) alone.

    Philox4x32 with ten rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), counter
    (position, 0, 0, 0), key (seed_lo, seed_hi).
    """
    mask = 0xFFFFFFFF
    counter, key = [position & mask, 0, 0, 0], [seed_lo & mask, seed_hi & mask]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & mask,
            (first >> 32) ^ counter[3] ^ key[1],
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return ((counter[0] >> 5) * 2**26 + (counter[1] >> 6)) / 2**53


def tell_logprobs(logits: Tensor, rows: Tensor | None, tokens: Tensor, vocab_size: int, count: int) -> Tensor:
    logits = logits if rows is None else logits.index_select(0, rows)
    tokens = tokens.long().clamp_min(0).unsqueeze(1)
    own = logits.gather(1, tokens)
    # Both logarithms are subtracted: their sum, rounded, would be less exact.
    base = logits[:, :vocab_size].amax(1, keepdim=True)
    log_sum = (logits[:, :vocab_size] - base).exp_().sum(1, keepdim=True).log_()
    ids = torch.cat((tokens, _find_largest(logits, vocab_size, count)), 1) if count else tokens
    logprobs = (logits.gather(1, ids) - base - log_sum).float()
    rank = 1 + _count_larger(logits, own, vocab_size)
    return torch.cat((rank, torch.stack((ids.int(), logprobs.view(torch.int32)), 2).flatten(1)), 1)


def _find_largest(logits: Tensor, vocab_size: int, count: int) -> Tensor:
    """Ids of the `count` largest of each row, in order. They lie in the tiles with the largest maxima, of equal ones
    the first, or in what is left after the last tile."""
    tiles = vocab_size // TILE
    if count >= tiles:
        return _first(logits[:, :vocab_size], count)
    best = _first(logits[:, : tiles * TILE].unflatten(1, (tiles, TILE)).amax(2), count).sort(1).values
    within = torch.arange(TILE, device=logits.device)
    rest = torch.arange(tiles * TILE, vocab_size, device=logits.device).expand(len(logits), -1)
    ids = torch.cat(((best.unsqueeze(2) * TILE + within).flatten(1), rest), 1)
    return ids.gather(1, _first(logits.gather(1, ids), count))


def _first(values: Tensor, count: int) -> Tensor:
    """Places [P, count] of the largest of each row [P, N] float32, largest first, the first of equal ones first."""
    bits = (values + 0.0).view(torch.int32)  # of 0 where it was -0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    # No two keys are equal, so topk leaves nothing open; a stable sort takes longer.
    keys = (ordered << 32) - torch.arange(values.shape[1], device=values.device)
    return keys.topk(count).indices


def _count_larger(logits: Tensor, than: Tensor, vocab_size: int) -> Tensor:
    """How many ids of each row have a larger logit -> [P, 1] int32. Where their number allows it eight are counted at
    a time, in the bytes of one sum: 16 rows of 151,936 take two cores 57 us, else 405."""
    larger = logits > than
    larger[:, vocab_size:] = False
    if larger.shape[1] % (8 * 16):
        return larger.sum(1, keepdim=True, dtype=torch.int32)
    # Each byte counts to 16 at most, so that none runs over.
    eights: Tensor = larger.view(torch.int64).unflatten(1, (16, -1)).sum(1)
    return eights.view(torch.uint8).sum(1, keepdim=True, dtype=torch.int32)
