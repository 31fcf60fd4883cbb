"""Log probabilities told of chosen and likeliest ids: the kernel and plain torch against float64 and a stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_helpers import INT_CANARY, in_wider_rows
from torch import Tensor

from nanoinfer import ops

# A vector and less; a slice of the kernel's, one less, one more; several; Qwen2's, whose tokenizer has fewer ids.
VOCABULARIES = [(1, 1), (3, 8), (40, 44), (127, 127), (8191, 8192), (8192, 8192), (8193, 8200), (20001, 20001),
                (151_665, 151_936)]  # fmt: skip


def random_logits(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def truth(logits: Tensor, rows: Tensor | None, tokens: Tensor, vocab: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks [P], ids [P, 1 + count] and their log probabilities in float64, as plainly as can be."""
    picked = (logits if rows is None else logits[rows.long()])[:, :vocab]
    own = picked.gather(1, tokens.long().unsqueeze(1))
    ids = torch.cat(
        (tokens.long().unsqueeze(1), torch.sort(picked, descending=True, stable=True).indices[:, :count]), 1
    )
    return 1 + (picked > own).sum(1), ids, picked.double().log_softmax(1).gather(1, ids)


def tell(device: str, logits: Tensor, rows: Tensor | None, tokens: Tensor, vocab: int, count: int) -> Tensor:
    """What the op tells, on the CPU."""
    moved = logits.to(device), None if rows is None else rows.to(device), tokens.to(device)
    before = moved[0].clone()
    told = ops.tell_logprobs(*moved, vocab, count)
    assert torch.equal(moved[0].view(torch.int32), before.view(torch.int32)), "logits are others' as well"
    assert told.dtype == torch.int32 and told.shape == (len(tokens), 3 + 2 * count)
    return told.cpu()


def check(told: Tensor, ranks: Tensor, ids: Tensor, logprobs: Tensor) -> None:
    assert torch.equal(told[:, 0].long(), ranks)
    assert torch.equal(told[:, 1::2].long(), ids)
    # Log probabilities of random logits are below 64, so that a last place is 4e-6.
    torch.testing.assert_close(told.view(torch.float32)[:, 2::2].double(), logprobs, rtol=0, atol=4e-6)


@pytest.mark.parametrize("count", [0, 1, 5, 20, 32, 50])
@pytest.mark.parametrize(("vocab", "columns"), VOCABULARIES)
def test_told_is_the_definition(device: str, vocab: int, columns: int, count: int) -> None:
    """For vocabularies of every size, rows in any order and again; what lies past the vocabulary is not looked at."""
    logits = random_logits(4, columns, seed=vocab)
    logits[:, vocab:] = 1000.0
    rows = torch.tensor([2, 0, 3, 2, 1], dtype=torch.int32)
    tokens = torch.randint(vocab, (5,), generator=torch.Generator().manual_seed(count)).int()
    count = min(count, vocab)
    check(tell(device, logits, rows, tokens, vocab, count), *truth(logits, rows, tokens, vocab, count))
    in_order = tell(device, logits, None, tokens[:4], vocab, count)
    check(in_order, *truth(logits, None, tokens[:4], vocab, count))
    strided = tell(device, in_wider_rows(logits), None, tokens[:4], vocab, count)
    check(strided, *truth(logits, None, tokens[:4], vocab, count))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 5), vocab=st.integers(1, 20_000), count=st.integers(0, 32), levels=st.integers(1, 3000),
    padding=st.integers(0, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_logits_come_in_order_of_ids(
    rows: int, vocab: int, count: int, levels: int, padding: int, seed: int
) -> None:
    """Rows of few different logits, some of them -inf, some zeros negative: ranks count what is larger alone."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randint(levels, (rows, vocab + padding), generator=generator) - levels // 2) / 64
    logits[:, 1::7] = -torch.inf
    logits[:, ::5] *= -1.0
    logits[:, ::5] = logits[:, ::5].nan_to_num(neginf=-torch.inf, posinf=-torch.inf)
    tokens = torch.randint(vocab, (rows,), generator=generator).int()
    count = min(count, vocab)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        told = tell(device, logits, None, tokens, vocab, count)
        ranks, ids, logprobs = truth(logits, None, tokens, vocab, count)
        if torch.isfinite(logits[:, :vocab].amax(1)).all():
            check(told, ranks, ids, logprobs)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "one high", "high in one place", "one not -inf"])
@pytest.mark.parametrize("count", [1, 5, 32])
def test_any_order_of_logits(device: str, count: int, order: str) -> None:
    """The largest all in one warp's part, in one thread's, or everywhere."""
    vocab = 30_000
    rising = torch.arange(vocab) / 1000.0
    high = torch.zeros(vocab)
    high[17_000:17_060] = 1 + torch.arange(60) % 7
    lone = torch.full((vocab,), -torch.inf)
    lone[29_999] = 1.0
    row = {
        "rising": rising, "falling": rising.flip(0), "equal": torch.full((vocab,), -3.0),
        "one high": torch.zeros(vocab).index_fill_(0, torch.tensor([12_345]), 9.0), "high in one place": high,
        "one not -inf": lone,
    }[order]  # fmt: skip
    logits, tokens = row.repeat(3, 1), torch.tensor([0, 17_001, 29_999], dtype=torch.int32)
    check(tell(device, logits, None, tokens, vocab, count), *truth(logits, None, tokens, vocab, count))


@pytest.mark.parametrize("count", [0, 1, 20, 40])
def test_accurate_as_plain_torch(device: str, count: int) -> None:
    """Flat and peaked rows of a large vocabulary; the largest error at most twice that of torch's log_softmax."""
    vocab = 151_936
    logits = torch.cat([random_logits(2, vocab, seed=i, scale=scale) for i, scale in enumerate((0.01, 1.0, 8.0))]) + 20
    tokens = torch.arange(6, dtype=torch.int32) * 20_000
    told = tell(device, logits, None, tokens, vocab, count).view(torch.float32)[:, 2::2].double()
    _, ids, expected = truth(logits, None, tokens, vocab, count)
    plain = logits.to(device).log_softmax(1).cpu().gather(1, ids).double()
    assert (told - expected).abs().max() <= 2 * (plain - expected).abs().max().clamp_min(2.0**-21)


@pytest.mark.parametrize("vocab", [40, 9000, 30_000])
def test_rows_that_are_not_finite_stay_alone(device: str, vocab: int) -> None:
    """A NaN, +inf or nothing but -inf: log probabilities NaN, ids that exist; the rows beside them do not notice."""
    logits = random_logits(7, vocab, seed=1)
    logits[0, 3] = logits[1, vocab // 2 :] = logits[2] = torch.nan
    logits[3, 5] = torch.inf
    logits[4] = -torch.inf
    tokens = torch.tensor([3, 0, 1, 5, 2, 7, -1], dtype=torch.int32)
    told = tell(device, logits, None, tokens, vocab, 8)
    numbers, ids = told.view(torch.float32)[:, 2::2], told[:, 1::2]
    assert numbers[:5].isnan().all() and ((ids >= 0) & (ids < vocab)).all() and (told[:, 0] >= 1).all()
    tokens[6] = 0  # as what is no id counts
    check(told[5:], *(each[5:] for each in truth(logits, None, tokens, vocab, 8)))


def test_a_row_does_not_depend_on_its_neighbours(device: str) -> None:
    """The same to the bit alone, among others, at another place and by its number."""
    logits = random_logits(70, 12_000, seed=5)
    tokens = torch.arange(70, dtype=torch.int32)
    together = tell(device, logits, None, tokens, 11_990, 7)
    flipped = tell(device, logits, tokens.flip(0), tokens.flip(0), 11_990, 7)
    assert torch.equal(flipped.flip(0), together)
    for row in (0, 33, 69):
        alone = tell(device, logits[row : row + 1], None, tokens[row : row + 1], 11_990, 7)
        assert torch.equal(alone[0], together[row])


def test_no_places_at_all(device: str) -> None:
    nothing = torch.empty(0, dtype=torch.int32)
    assert tell(device, torch.randn(3, 50), nothing, nothing, 50, 4).shape == (0, 11)
    assert tell(device, torch.empty(0, 50), None, nothing, 50, 4).shape == (0, 11)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"logits": torch.ones(2, 8).half()}, "logits must have dtype Float, got Half"),
     ({"logits": torch.ones(2, 8).T}, "logits must have packed rows"),
     ({"rows": torch.zeros(3, dtype=torch.int32)}, r"rows must have shape \[2\], got \[3\]"),
     ({"rows": torch.zeros(2)}, "rows must have dtype Int, got Float"),
     ({"tokens": torch.zeros(3, dtype=torch.int32)}, r"tokens must have shape \[2\], got \[3\]"),
     ({"tokens": torch.zeros(2).long()}, "tokens must have dtype Int, got Long"),
     ({"vocab_size": 9}, r"vocab_size must be in \[1, 8\], the columns of logits, got 9"),
     ({"vocab_size": 0}, "vocab_size must be in"), ({"count": 9}, r"count must be in \[0, 8\], got 9"),
     ({"count": -1}, "count must be in")],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused_on_a_gpu(changes: dict, message: str) -> None:
    """Where there is a kernel, which reads what it is told to."""
    arguments = {"logits": torch.ones(2, 8), "rows": None, "tokens": torch.zeros(2, dtype=torch.int32), "vocab_size": 8,
                 "count": 2} | changes  # fmt: skip
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.tell_logprobs(**moved)


def test_tokens_of_many_likeliest_take_plain_torch(device: str) -> None:
    """All of them, as logprobs=-1 asks."""
    logits, tokens = random_logits(2, 300, seed=2), torch.tensor([INT_CANARY, 299], dtype=torch.int32)
    told = tell(device, logits, None, tokens, 300, 300)
    check(told, *truth(logits, None, tokens.clamp_min(0), 300, 300))


@pytest.mark.parametrize("vocab", [3, 128, 151_936, 152_064])
def test_many_are_counted_right(device: str, vocab: int) -> None:
    """Every id but one of a large vocabulary: no sum runs over."""
    logits = torch.ones(2, vocab)
    logits[:, vocab // 2] = 0
    told = tell(device, logits, None, torch.full((2,), vocab // 2, dtype=torch.int32), vocab, 1)
    assert told[:, 0].tolist() == [vocab] * 2
