"""What cannot be served is refused before any work, by field, value and limit; requests beside it do not notice.

A rule each: numbers, counts, prompts, lengths, batches.
"""

from collections.abc import Iterator
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoinfer import LLM, InvalidRequest, SamplingParams

DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"
GOLDEN = "def fibonacci(n):"
MAX_LENGTH = 64
VOCAB = 4096
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, dtype="float32", device="cpu", max_model_len=MAX_LENGTH, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def golden(llm: LLM) -> list[int]:
    return llm.generate(GOLDEN, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def check_refused(
    llm: LLM, golden: list[int], prompt: object, params: SamplingParams, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two good prompts: an error that names it and nothing done, or the error on its output alone."""
    prompts, each = [GOLDEN, prompt, GOLDEN], [GREEDY, params, GREEDY]
    engine = llm.llm_engine
    before = engine.num_sequences
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", None)  # any work would fail
        with pytest.raises(InvalidRequest, match=r"prompts\[1\]: .*") as error:
            llm.generate(prompts, each, use_tqdm=False)
    assert message in str(error.value) and len(str(error.value)) < 300
    assert engine.num_sequences == before and not engine.has_unfinished_requests()
    outs = llm.generate(prompts, each, use_tqdm=False, on_error="return")
    assert [out.error and message in out.error for out in outs] == [None, True, None]
    assert [out.outputs[0].token_ids for out in outs] == [golden, [], golden]
    assert engine.blocks.num_free == engine.blocks.num_blocks


JUNK = [
    float("nan"), float("inf"), float("-inf"), -0.0, 1e-300, 1e308, 10**400, 2**63, -(2**63) - 1, 2**31, -1, 0, True,
    None, "0.7", "", b"x", Decimal("0.5"), Fraction(1, 2), 1 + 0j, np.float64("nan"), np.int64(-(2**63)),
    np.bool_(True), np.ones(2), torch.tensor(1.0), [], [None], [[]], {}, {None: 1}, {"x": 1}, {1: None}, object(), len,
]  # fmt: skip
SWITCHES = {"ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"}
SWITCHES |= {"spaces_between_special_tokens"}
INTEGERS = {"n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"}
LISTS = {"stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids", "logits_processors"}
OPTIONAL = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}
NUMBERS = {"temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"}


@pytest.mark.parametrize("field", [field.name for field in fields(SamplingParams)])
def test_numbers(field: str) -> None:
    """Any value at all is taken for what it is or refused by the field's name, never something else raised."""
    for value in JUNK:
        try:
            SamplingParams(**{field: value})
        except InvalidRequest as error:
            assert field in str(error)
        else:
            if field in NUMBERS:
                assert isinstance(value, (int, float, Fraction)) and not isinstance(value, bool) and abs(value) <= 2
            if field in SWITCHES:
                assert isinstance(value, (bool, np.bool_))
            if field in INTEGERS:
                assert isinstance(value, (int, np.integer, np.bool_)) or (value is None and field in OPTIONAL)
                assert not isinstance(value, (bool, np.bool_)) or "logprobs" in field  # vLLM's True is 1
            if field in LISTS:
                assert value is None or (isinstance(value, str) and field == "stop") or isinstance(value, (list, dict))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 0}, "n must lie in [1, 4096], got 0"), ({"n": 2**31}, "n must lie in [1, 4096], got 2147483648"),
     ({"n": 4097}, "got 4097"), ({"max_tokens": 0}, "max_tokens must lie in [1, 2147483647], got 0"),
     ({"min_tokens": 17}, "min_tokens must be at most max_tokens = 16, got 17"),
     ({"stop": ["x"] * 1025}, "stop may hold 1024 strings, got 1025"), ({"stop": ""}, "stop must be"),
     ({"stop_token_ids": [1] * 1025}, "stop_token_ids may hold 1024 ids, got 1025"),
     ({"logit_bias": dict.fromkeys(range(2**20 + 1), 0)}, "logit_bias may hold 1048576 entries, got 1048577"),
     ({"allowed_token_ids": [1] * (2**20 + 1)}, "allowed_token_ids may hold 1048576 entries, got 1048577"),
     ({"bad_words": ["x"] * 1025}, "bad_words may hold 1024 entries, got 1025")],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_counts(options: dict[str, object], message: str) -> None:
    """Every list has a longest length, every number of things a highest one."""
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("field", sorted({field.name for field in fields(SamplingParams)} - SWITCHES))
def test_messages_stay_short(field: str) -> None:
    """What is refused may be as long as a vocabulary; the error names the field and shows where the value begins."""
    for value in (set(range(100_000)), [""] * 100_000, b"x" * 100_000, dict.fromkeys(range(2**20 + 1), "x")):
        with pytest.raises(InvalidRequest) as error:
            SamplingParams(**{field: value})
        assert field in str(error.value) and len(str(error.value)) < 200


def test_counts_that_are_fine(llm: LLM) -> None:
    """As many stop strings and ids as may be, and ones longer than any output."""
    params = SamplingParams(
        temperature=0, max_tokens=5, ignore_eos=True, stop=["\0" * 10_000, *(f"\0{i}" for i in range(1023))],
        bad_words=["\0"] * 1024, logit_bias=dict.fromkeys(range(VOCAB), 0.5), allowed_token_ids=list(range(VOCAB)),
    )  # fmt: skip
    assert len(llm.generate(GOLDEN, params, use_tqdm=False)[0]["token_ids"]) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stop_token_ids": [VOCAB]}, f"stop_token_ids holds {VOCAB}; the vocabulary has {VOCAB} ids"),
     ({"allowed_token_ids": [5, VOCAB]}, f"allowed_token_ids holds {VOCAB}; the vocabulary has {VOCAB} ids"),
     ({"logit_bias": {2**31 - 1: 1}}, f"logit_bias holds {2**31 - 1}; the vocabulary has {VOCAB} ids"),
     ({"logprobs": 21}, "logprobs must be at most max_logprobs = 20, got 21"),
     ({"prompt_logprobs": -1}, "prompt_logprobs must be at most max_logprobs = 20, got -1")],
    ids=str,
)  # fmt: skip
def test_what_this_model_does_not_have(
    llm: LLM, golden: list[int], options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the model's size or the engine's options can tell."""
    check_refused(llm, golden, GOLDEN, SamplingParams(**options), message, monkeypatch)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "prompt is empty: it needs at least 1 token"), ([], "prompt is empty"),
     ("x" * 10_000_000, f"prompt of 10000000 characters: {MAX_LENGTH} tokens hold"),
     ("\ud800", "prompt is not valid Unicode text"), ([VOCAB], f"id {VOCAB} is out of vocabulary: ids are 0 to 4095"),
     ([-1], "-1 is out of vocabulary"), ([2**31], f"{2**31} is out of"), ([2**63], f"{2**63} is out of"),
     ([True], "list of token ids (integers), got list [True]"), ([3.0], "list of token ids"), ([[1]], "token ids"),
     (b"bytes", "list of token ids (integers), got bytes b'bytes'"), (None, "got NoneType None"),
     (torch.tensor([1, 2]), "got Tensor"), (np.ones(3), "list of token ids"), ({"prompt": b"x"}, "must be a string"),
     ({"prompt_embeds": 1}, "unknown keys ['prompt_embeds']"), ({}, "must hold 'prompt' or 'prompt_token_ids'")],
    ids=lambda value: repr(value)[:25],
)  # fmt: skip
def test_prompts(llm: LLM, golden: list[int], prompt: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form of prompt that cannot be served."""
    check_refused(llm, golden, prompt, GREEDY, message, monkeypatch)


@pytest.mark.parametrize("prompt", ["\0", "\0 x \0", "é世界🙂", [np.int64(5)], np.array([5, 6]), (5, 6), "<|im_end|>"])
def test_prompts_that_are_fine(llm: LLM, prompt: object) -> None:
    """Any character there is, also the one that ends C's strings, and numpy's integers."""
    assert len(llm.generate([prompt], GREEDY, use_tqdm=False)[0]["token_ids"]) == 5


@pytest.mark.parametrize("length", [MAX_LENGTH - 2, MAX_LENGTH - 1, MAX_LENGTH, MAX_LENGTH + 1, 10 * MAX_LENGTH])
@pytest.mark.parametrize("max_tokens", [None, 1, 5])
def test_lengths(
    llm: LLM, golden: list[int], length: int, max_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt must leave room for a token; output ends at max_model_len whatever max_tokens says."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    room = MAX_LENGTH - length
    if room < 1:
        message = f"prompt of {length} tokens: with at least 1 output token it must fit max_model_len = {MAX_LENGTH}"
        check_refused(llm, golden, [5] * length, params, message, monkeypatch)
        return
    (out,) = llm.generate([5] * length, params, use_tqdm=False)
    assert len(out["token_ids"]) == min(room, max_tokens or room) and out.outputs[0].finish_reason == "length"


def test_lengths_beyond_the_pool(llm: LLM) -> None:
    """A model of 64 positions on a pool of 32: a longer prompt would wait for ever."""
    with LLM(DEMO, device="cpu", num_gpu_blocks_override=2, max_model_len=-1) as small:
        assert len(small.generate([5] * 31, SamplingParams(max_tokens=9), use_tqdm=False)[0]["token_ids"]) == 1
        with pytest.raises(InvalidRequest, match=r"prompt of 32 tokens: .* must fit max_model_len = 32"):
            small.generate([5] * 32, GREEDY, use_tqdm=False)


def test_batches(llm: LLM, golden: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """None is fine; one bad of 1000 is named before any work; lists of different lengths are refused."""
    assert llm.generate([], use_tqdm=False) == [] == llm.generate([], [], use_tqdm=False)
    prompts: list[object] = [GOLDEN] * 1000
    prompts[977] = [VOCAB]
    before = llm.llm_engine.num_sequences
    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine.runner, "launch", None)
        with pytest.raises(InvalidRequest, match=rf"prompts\[977\]: prompt token id {VOCAB} is out of vocabulary"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        with pytest.raises(InvalidRequest, match="sampling_params has 2 entries for 1000 prompts"):
            llm.generate(prompts, [GREEDY] * 2, use_tqdm=False, on_error="return")
        with pytest.raises(InvalidRequest, match=r"sampling_params must be a SamplingParams, got \{\}"):
            llm.generate([GOLDEN], {}, use_tqdm=False)
    assert llm.llm_engine.num_sequences == before
    outs = llm.generate(prompts[970:980], GREEDY, use_tqdm=False, on_error="return")
    assert [out.error is not None for out in outs] == [False] * 7 + [True] + [False] * 2
    assert all(out["token_ids"] == golden for out in outs if not out.error)
