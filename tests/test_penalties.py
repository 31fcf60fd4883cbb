"""Penalties: every kernel against its definition, and the engine against a loop in plain torch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_helpers import INT_CANARY, bits, in_wider_rows, make_rows
from test_engine import SCHEDULES, check_nothing_kept, make_llm
from torch import Tensor
from transformers import Qwen2ForCausalLM

from nanoinfer import SamplingParams, ops, reference
from nanoinfer.engine.llm_engine import LLMEngine
from nanoinfer.engine.sequence import Sequence
from nanoinfer.row_state import FREQUENCY_PENALTY, LENGTH, PRESENCE_PENALTY, PROMPT_LENGTH, REPETITION_PENALTY

DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"


def paged(histories: list[list[int]], block_size: int) -> tuple[Tensor, Tensor]:
    """block_tables and slot_tokens of rows with blocks in random order, and of the last row; other slots hold no id."""
    per_row = -(-max(map(len, histories)) // block_size) + 1
    blocks = (len(histories) + 1) * per_row
    tables = torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).int().view(-1, per_row)
    slot_tokens = torch.full((blocks, block_size), INT_CANARY, dtype=torch.int32)
    for row, ids in enumerate(histories):
        padded = ids + [INT_CANARY] * (per_row * block_size - len(ids))
        slot_tokens[tables[row].long()] = torch.tensor(padded, dtype=torch.int32).view(per_row, block_size)
    return tables, slot_tokens.flatten()


def check_definition(
    device: str, logits: Tensor, sample_rows: Tensor, row_state: Tensor, histories: list[list[int]], block_size: int
) -> Tensor:
    """The op gives the definition's logits bit for bit, and leaves what lies beside its rows; the result."""
    tables, slot_tokens = paged(histories, block_size)
    got, expected = in_wider_rows(logits.to(device)), logits.clone()
    wide = got._base.clone()
    arguments = [t.to(device) for t in (sample_rows, row_state, tables, slot_tokens)]
    ops.penalize(got, *arguments, block_size)
    reference.penalize(expected, sample_rows, row_state, tables, slot_tokens, block_size)
    assert torch.equal(bits(got.cpu()), bits(expected))
    wide[:, 1] = got
    assert torch.equal(bits(got._base), bits(wide))
    return expected


# (repetition, presence, frequency); a batch has a row of each.
PENALTIES = [(1.3, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.0, 0.3), (0.7, -2.0, -0.7), (1.2, 0.1, 2.0), (1.0, 0.0, 0.0)]


def penalized_rows(lengths: list[tuple[int, int]]) -> Tensor:
    """row_state of a row for each of PENALTIES; lengths are (prompt, all)."""
    state = make_rows(len(PENALTIES))
    for row, (penalties, (prompt_length, length)) in enumerate(zip(PENALTIES, lengths, strict=True)):
        floats = state.view(torch.float32)[row]
        floats[REPETITION_PENALTY], floats[PRESENCE_PENALTY], floats[FREQUENCY_PENALTY] = torch.tensor(penalties)
        state[row, PROMPT_LENGTH], state[row, LENGTH] = prompt_length, length
    state[-1] = state[4]  # the last row belongs to nobody, whatever it holds
    return state


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("vocab", [1, 37, 10_000, 2**18 + 3])
def test_every_row_loses_by_its_own_penalties(device: str, vocab: int, block_size: int) -> None:
    """Bit for bit the definition for rows that differ, ids once and repeated, also beyond 2^18; padding stays."""
    lengths = [(0, 50), (1, 50), (20, 50), (50, 50), (3, 7), (0, 50)]
    generator = torch.Generator().manual_seed(3)
    histories = [torch.randint(0, vocab, (length,), generator=generator) for _, length in lengths]
    for ids in histories:
        ids[::3] = vocab - 1 - torch.arange(len(ids[::3])) % min(vocab, 5)
    sample_rows = torch.tensor([4, 6, 0, 5, 2, 1, 3], dtype=torch.int32)
    logits = torch.randn(7, vocab, generator=generator) * 2
    out = check_definition(
        device, logits, sample_rows, penalized_rows(lengths), [h.tolist() for h in histories], block_size
    )
    changed = (out != logits).sum(1).tolist()
    seen = {row: len(set(histories[row].tolist())) for row in range(6)}
    output = {row: len(set(histories[row][prompt:].tolist())) for row, (prompt, _) in enumerate(lengths)}
    assert changed == [seen[4], 0, seen[0], 0, output[2], output[1], seen[3]]


def one_bucket(vocab: int) -> Tensor:
    """Ids for which the CUDA kernel's table of counts has the same few places, whose hash is these bits."""
    ids = torch.arange(vocab)
    return ids[(ids * 0x9E3779B1 & 0xFFFFFFFF) >> 21 < 8]


@pytest.mark.parametrize("kind", ["all ids", "few ids", "one id", "one bucket"])
def test_long_outputs(device: str, kind: str) -> None:
    """Up to 40,000 tokens of output, of more ids than a table in a GPU's shared memory holds, and of one alone."""
    vocab, length = 151_936, 40_000
    candidates = {
        "all ids": torch.arange(vocab), "few ids": torch.arange(1500) * 101, "one id": torch.tensor([77]),
        "one bucket": one_bucket(vocab),
    }[kind]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    picked = torch.randint(0, len(candidates), (len(PENALTIES), length), generator=generator)
    lengths = [(0, length), (100, length), (7, length), (20_000, length), (39_000, length), (0, length)]
    logits = torch.randn(5, vocab, generator=generator)
    rows = torch.tensor([4, 3, 2, 1, 0], dtype=torch.int32)
    out = check_definition(device, logits, rows, penalized_rows(lengths), candidates[picked].tolist(), 32)
    assert ((out != logits).sum(1) > 0).all()


def by_hand(logits: np.ndarray, prompt: list[int], output: list[int], penalties: tuple[float, float, float]) -> None:
    """One row's penalties, an id at a time, each operation rounded to float32."""
    repetition, presence, frequency = map(np.float32, penalties)
    for i in set(prompt + output):
        logits[i] = logits[i] / repetition if logits[i] > 0 else logits[i] * repetition
    for i, count in Counter(output).items():
        logits[i] = logits[i] - (frequency * np.float32(count) + presence)


a_penalty = st.floats(-2, 2, width=32)


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 19), min_size=1, max_size=20),
    output=st.lists(st.integers(0, 19), max_size=40),
    penalties=st.tuples(st.floats(2**-19, 1e4, width=32), a_penalty, a_penalty),
    block_size=st.sampled_from([1, 2, 16]),
    seed=st.integers(0, 99),
)
def test_definition_by_hand(
    prompt: list[int], output: list[int], penalties: tuple[float, float, float], block_size: int, seed: int
) -> None:
    """For any history and penalties the definition, and with it every kernel, says what a loop over ids says."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)) * 3
    repetition, presence, frequency = penalties
    state = make_rows(1, penalty=repetition, presence=presence, frequency=frequency)
    state[0, PROMPT_LENGTH], state[0, LENGTH] = len(prompt), len(prompt + output)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        got = check_definition(device, logits, torch.zeros(1).int(), state, [prompt + output], block_size)
    expected = logits[0].numpy().copy()
    by_hand(expected, prompt, output, penalties)
    assert np.array_equal(got[0].numpy(), expected)


def test_what_no_penalty_looks_at_is_not_read(device: str) -> None:
    """Without a penalty a row's ids may be anything; without the repetition penalty its prompt's may."""
    logits = torch.randn(1, 10).to(device)
    before, row = logits.clone(), torch.zeros(1, dtype=torch.int32, device=device)
    state, tables = make_rows(1), torch.full((2, 1), INT_CANARY, dtype=torch.int32, device=device)
    ops.penalize(logits, row, state.to(device), tables, tables[0], 4)
    assert torch.equal(logits, before)
    state = make_rows(1, presence=0.5)
    state[0, PROMPT_LENGTH], state[0, LENGTH] = 4, 5
    tables = torch.tensor([[INT_CANARY, 0], [0, 0]], dtype=torch.int32, device=device)
    slot_tokens = torch.tensor([7, INT_CANARY, INT_CANARY, INT_CANARY], dtype=torch.int32, device=device)
    ops.penalize(logits, row, state.to(device), tables, slot_tokens, 4)
    before[0, 7] -= 0.5
    assert torch.equal(logits, before)


TEXTS = ["def fibonacci(n):", "import os\n\n\ndef read_file(path):", "class Stack:\n", "x", "# The answer is"]
REQUESTS = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.0, "frequency_penalty": -0.5},
    {"presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    {},
]


def generate(engine: LLMEngine, options: list[dict[str, float]]) -> list[Sequence]:
    """Run TEXTS to their end, each with its options; what became of each, preemptions included."""
    ids = [
        engine.add_request(text, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, **own))
        for text, own in zip(TEXTS, options, strict=True)
    ]
    sequences = [engine.replies[request_id].seqs[0] for request_id in ids]
    while engine.has_unfinished_requests():
        engine.step()
    return sequences


@torch.inference_mode()
def check_penalized(hf: Qwen2ForCausalLM, seq: Sequence) -> None:
    """Each generated token is the largest of Hugging Face's logits less the penalties, given all before it."""
    prompt, output, params = seq.tokens[: seq.num_prompt_tokens], seq.output_tokens, seq.params
    logits = hf(torch.tensor([seq.tokens]), use_cache=False, logits_to_keep=len(output) + 1).logits[0, :-1]
    for place, row in enumerate(logits.numpy()):
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        by_hand(row, prompt, output[:place], penalties)
        assert output[place] == row.argmax(), f"token {place} of {params}"


@pytest.mark.parametrize(
    "schedule", ["all at once", "budget 7", "block size 1", "small pool", "a step ahead, small pool, budget 7"]
)
def test_penalties_under_every_schedule(device: str, schedule: str) -> None:
    """Chunked, recomputed after preemption, from the cache: output stays output, and nobody else's prompt."""
    hf = Qwen2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with make_llm(DEMO, device, SCHEDULES[schedule]) as llm:
        for _ in range(2):  # cold, then cached
            run = generate(llm.llm_engine, REQUESTS)
            assert any(seq.num_preemptions for seq in run) == ("small pool" in schedule)
            for seq in run:
                check_penalized(hf, seq)
        free = generate(llm.llm_engine, [{}] * len(TEXTS))
        same = [seq.output_tokens == other.output_tokens for seq, other in zip(run, free, strict=True)]
        assert same == [False, False, False, False, True]
        check_nothing_kept(llm)
