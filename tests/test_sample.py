"""The sampler: equal tokens to its definition, the right distribution, and no row that depends on another."""

import pytest
import torch
from op_helpers import INT_CANARY, RedZone, in_wider_rows, make_rows
from torch import Tensor

from nanoinfer import ops, reference
from nanoinfer.row_state import LAST_TOKEN, LENGTH, SEED_LO

# (temperature, top_k, top_p, min_p): greedy, each filter alone, and together.
SETTINGS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "all": (1.0, 0, 1.0, 0.0),
    "cold": (0.01, 0, 1.0, 0.0),
    "hot": (100.0, 0, 1.0, 0.0),
    "top_k 1": (1.0, 1, 1.0, 0.0),
    "top_k 20": (0.7, 20, 1.0, 0.0),
    "top_k 1000": (1.0, 1000, 1.0, 0.0),  # more than a row has tiles
    "top_p 0.8": (1.0, 0, 0.8, 0.0),
    "top_p tiny": (1.0, 0, 1e-6, 0.0),
    "min_p": (1.3, 0, 1.0, 0.05),
    "min_p 1": (1.0, 0, 1.0, 1.0),
    "top_k and top_p": (0.7, 20, 0.8, 0.0),
    "min_p before top_k": (1.0, 300, 1.0, 0.2),
    "all three": (2.0, 100, 0.95, 1e-4),
}
CERTAIN = ("greedy", "cold", "top_k 1", "top_p tiny", "min_p 1")  # draw the same id whatever the random number
settings = pytest.mark.parametrize("setting", list(SETTINGS))
VOCABULARIES = [1, 2, 15, 511, 512, 513, 8193, 10000, 151936]


def random_logits(rows: int, vocab: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits: Tensor, row_state: Tensor, sample_rows: Tensor, vocab: int, device: str) -> tuple[Tensor, Tensor]:
    """Tokens and row_state after one call of the op, both on the CPU."""
    zone = RedZone()
    state = zone.copy(row_state.to(device))
    tokens = zone.copy(torch.full(sample_rows.shape, INT_CANARY, dtype=torch.int32, device=device))
    ops.sample(logits.to(device), sample_rows.to(device), state, tokens, vocab)
    zone.check()
    return tokens.cpu(), state.cpu()


def draw_reference(logits: Tensor, row_state: Tensor, sample_rows: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    state, tokens = row_state.clone(), torch.full(sample_rows.shape, INT_CANARY, dtype=torch.int32)
    reference.sample(logits, sample_rows, state, tokens, vocab)
    return tokens, state


@settings
@pytest.mark.parametrize("scale", [0.01, 4.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tokens_are_the_definitions(device: str, vocab: int, scale: float, setting: str) -> None:
    """The same ids for the same seeds, flat or peaked logits, whatever the size; what lies past the vocabulary is not
    read, the scratch row draws nothing, and each row's length and last token move on."""
    rows = 1 if vocab > 100_000 else 6
    row_state = make_rows(rows, *SETTINGS[setting], seed=vocab)
    sample_rows = torch.arange(rows + 1, dtype=torch.int32).flip(0)
    logits = torch.full((rows + 1, vocab + 5), torch.nan)
    logits[:, :vocab] = random_logits(rows + 1, vocab, scale, seed=vocab)
    logits = in_wider_rows(logits)
    tokens, state = draw(logits, row_state, sample_rows, vocab, device)
    expected_tokens, expected_state = draw_reference(logits, row_state, sample_rows, vocab)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(state, expected_state)


@settings
def test_ties_stay_or_go_together(device: str, setting: str) -> None:
    """On logits full of equal values every id that the filters keep is drawn, and no other."""
    generator = torch.Generator().manual_seed(7)
    for vocab in (3, 12, 20):
        logits = torch.randint(0, 4, (vocab,), generator=generator).float()
        temperature, *filters = SETTINGS[setting]
        row_state = make_rows(20_000, *SETTINGS[setting], seed=vocab)
        tokens, _ = draw(logits.expand(20_000, -1), row_state, torch.arange(20_000, dtype=torch.int32), vocab, device)
        if temperature == 0:
            kept = {int(logits.argmax())}
        else:
            weights = reference.keep_weights(logits.double() / temperature, *filters)
            # An id that a right sampler would draw less than 20 times in 20,000 proves nothing by its absence.
            kept = set((weights > 1e-3 * weights.sum()).nonzero().flatten().tolist())
            assert set(tokens.tolist()) <= set(weights.nonzero().flatten().tolist())
        assert kept <= set(tokens.tolist())


@pytest.mark.parametrize("setting", ["all", "hot", "top_k 20", "top_p 0.8", "min_p", "all three"])
def test_draws_follow_the_distribution(device: str, setting: str) -> None:
    """A G-test of 200,000 draws, independent of how the random number is made: p below 1e-6 in no case."""
    count, vocab = 200_000, 40
    logits = random_logits(1, vocab, 1.5)[0]
    temperature, *filters = SETTINGS[setting]
    row_state = make_rows(count, *SETTINGS[setting])
    tokens, _ = draw(logits.expand(count, -1), row_state, torch.arange(count, dtype=torch.int32), vocab, device)
    weights = reference.keep_weights(logits.double() / temperature, *filters)
    assert g_test(torch.bincount(tokens, minlength=vocab), weights / weights.sum()) > 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("setting", ["all", "top_k 20", "top_p 0.8", "all three"])
@pytest.mark.parametrize("vocab", [40, 5000])
def test_ten_million_draws_follow_the_distribution(vocab: int, setting: str) -> None:
    """A bias of 1 in 1,000 of a likely id would show; nothing that the filters cut is ever drawn."""
    rounds, count = 20, 500_000
    logits = random_logits(1, vocab, 2.0)[0]
    temperature, *filters = SETTINGS[setting]
    weights = reference.keep_weights(logits.double() / temperature, *filters)
    rows, counts = torch.arange(count, dtype=torch.int32), torch.zeros(vocab, dtype=torch.int64)
    spread = logits.cuda().expand(count, -1)
    for i in range(rounds):
        tokens, _ = draw(spread, make_rows(count, *SETTINGS[setting], seed=i), rows, vocab, "cuda")
        counts += torch.bincount(tokens, minlength=vocab)
    assert counts.sum() == 10_000_000
    assert g_test(counts, weights / weights.sum()) >= 1e-6


def g_test(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of counts under the probabilities: 2 sum(n log(n / expected)) is chi-squared (Woolf, 1957)."""
    assert not counts[probabilities == 0].any()
    counts, expected = counts[probabilities > 0].double(), probabilities[probabilities > 0] * counts.sum()
    g = 2 * torch.xlogy(counts, counts / expected).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, g / 2))


def test_successive_lengths_draw_independently(device: str) -> None:
    """A row's draws at consecutive lengths, one seed: the distribution holds along a sequence as well."""
    count, vocab = 200_000, 5
    row_state = make_rows(count)
    row_state[:, SEED_LO : SEED_LO + 2] = 12345
    row_state[:, LENGTH] = torch.arange(count + 1)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    tokens, _ = draw(logits.expand(count, -1), row_state, torch.arange(count, dtype=torch.int32), vocab, device)
    p = logits.double().softmax(0)
    assert g_test(torch.bincount(tokens, minlength=vocab), p) > 1e-6
    pairs = tokens[:-1:2].long() * vocab + tokens[1::2]
    assert g_test(torch.bincount(pairs, minlength=vocab**2), torch.outer(p, p).flatten()) > 1e-6


def test_random_numbers_are_philox() -> None:
    """The published vector of Philox4x32-10 for a counter and a key of zeros (Random123, kat_vectors)."""
    assert reference.uniform(0, 0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_a_row_does_not_depend_on_its_neighbours(device: str) -> None:
    """The same request draws the same token alone, among others, and with any number of threads."""
    rows, vocab = 50, 1000
    logits, row_state = random_logits(rows, vocab, 3.0), make_rows(rows, 0.9, 40, 0.9, 0.01)
    together, _ = draw(logits, row_state, torch.arange(rows, dtype=torch.int32), vocab, device)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for row in (0, 17, 49):
        alone, _ = draw(logits[row : row + 1], row_state, torch.tensor([row], dtype=torch.int32), vocab, device)
        assert alone[0] == together[row]
    torch.set_num_threads(2)
    again, _ = draw(logits.flip(0), row_state, torch.arange(rows, dtype=torch.int32).flip(0), vocab, device)
    torch.set_num_threads(before)
    assert torch.equal(again.flip(0), together)


@settings
def test_seed_and_position_decide_in_any_batch(device: str, setting: str) -> None:
    """The same logits, seed and position give the same id in batches of any size, in any row and any place."""
    vocab = 2000
    row_state = make_rows(300, *SETTINGS[setting], seed=9)
    row_state[:, SEED_LO] = torch.arange(301) // 6  # some share a seed, some a position, some both
    row_state[:, SEED_LO + 1], row_state[:, LENGTH] = 5, torch.arange(301) % 3
    logits = random_logits(1, vocab, 2.0).expand(300, -1)
    drawn: dict[tuple[int, int], set[int]] = {}
    generator = torch.Generator().manual_seed(4)
    for size in (1, 2, 17, 64, 300):
        rows = torch.randperm(300, generator=generator)[:size].int()
        tokens, _ = draw(logits[:size], row_state, rows, vocab, device)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            drawn.setdefault((row // 6, row % 3), set()).add(token)
    assert all(len(tokens) == 1 for tokens in drawn.values()) and len(drawn) == 150
    different = {token for tokens in drawn.values() for token in tokens}
    assert len(different) == 1 if setting in CERTAIN else len(different) > 1


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_greedy_takes_the_lowest_of_the_largest(device: str, vocab: int) -> None:
    """Ties far apart, in any tile, at the very end: the lowest id wins, as with argmax."""
    places = sorted({0, vocab // 3, vocab // 2, vocab - 1})
    logits = torch.full((len(places), vocab), -3.0)
    for i in range(len(places)):
        logits[i, places[i:]] = 2.5
    tokens, _ = draw(logits, make_rows(len(places), 0.0), torch.arange(len(places), dtype=torch.int32), vocab, device)
    assert tokens.tolist() == places


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [1, 40, 10_000])
def test_what_is_not_finite_fails_its_row_alone(device: str, vocab: int, temperature: float) -> None:
    """NaN anywhere, +inf, or nothing but -inf: -1. A -inf among others is an id that is never drawn."""
    logits = torch.zeros(6, vocab)
    logits[0, 0] = logits[1, -1] = torch.nan
    logits[2, vocab // 2] = torch.inf
    logits[3] = -torch.inf
    logits[4, 1:] = -torch.inf
    tokens, state = draw(logits, make_rows(6, temperature), torch.arange(6, dtype=torch.int32), vocab, device)
    assert tokens[:5].tolist() == [-1, -1, -1, -1, 0]
    assert tokens[5] >= 0
    assert state[:4, LAST_TOKEN].tolist() == [0, 0, 0, 0]  # an id that exists: the next step may look it up
