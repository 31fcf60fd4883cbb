"""Bad input gets a typed error naming field, value and limit before any work; requests beside it are unharmed."""

import os
import signal
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_checkpoint

from nanoinfer import LLM, EngineDead, InvalidRequest, LLMEngine, SamplingParams
from nanoinfer.engine.llm_engine import derived_seed

GOLDEN = [5, 7, 11, 13]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder)
    with LLM(
        folder, dtype="float32", device="cpu", skip_tokenizer_init=True, num_gpu_blocks_override=10, max_model_len=100
    ) as llm:
        yield llm


@pytest.fixture(autouse=True)
def golden_request_is_unharmed(llm: LLM) -> Iterator[None]:
    """Around every bad input here: the same tokens for a good one, and no block or row gone."""
    before = llm.generate(GOLDEN, GREEDY, use_tqdm=False)[0]["token_ids"]
    yield
    assert llm.generate(GOLDEN, GREEDY, use_tqdm=False)[0]["token_ids"] == before
    engine = llm.llm_engine
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert len(engine.scheduler.free_rows) == 2 * engine.config.max_num_seqs
    assert engine.get_num_unfinished_requests() == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], "prompt is empty"),
        ("text", "skip_tokenizer_init=True"),
        ([1, -1], "-1 is out of vocabulary: ids are 0 to 198"),
        ([199], "199 is out of vocabulary: ids are 0 to 198"),
        ([2**31], f"{2**31} is out of vocabulary"),
        ([2**63], f"{2**63} is out of vocabulary"),
        ([1.0], "list of token ids"),
        ([True], "list of token ids"),
        ([[1, 2], [3]], None),  # two prompts, both fine
        ([[[1]]], "list of token ids"),
        ([None], "list of token ids"),
        (None, "list of token ids"),
        (b"bytes", "list of token ids"),
        (torch.tensor([[1, 2]]), "list of token ids"),
        ({"prompt_token_ids": [1], "promt": "x"}, "unknown keys"),
        ({"promt": "x", 1: 2}, "unknown keys"),
        ({}, "must hold 'prompt' or 'prompt_token_ids'"),
        ({"prompt": 3}, "prompt must be a string"),
        ({"prompt_token_ids": [1], "cache_salt": 3}, "cache_salt must be a string"),
        ([1] * 100, "prompt of 100 tokens: with at least 1 output token it must fit max_model_len = 100"),
        ([1] * 5000, "max_model_len = 100"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_prompts(llm: LLM, prompt: object, message: str | None) -> None:
    """Every form of prompt that cannot be served is refused by name; the forms that can are served."""
    if message is None:
        assert len(llm.generate(prompt, GREEDY, use_tqdm=False)) == 2
        return
    with pytest.raises(InvalidRequest, match=message.replace("(", r"\(")):
        llm.generate(prompt, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("prompt", [np.array([1, 2]), [np.int64(1), np.int32(2)], (1, 2), {"prompt_token_ids": [1, 2]}])
def test_forms_of_token_ids(llm: LLM, prompt: object) -> None:
    """numpy arrays and integers, tuples and dicts are the prompt [1, 2]."""
    want = llm.generate([1, 2], GREEDY, use_tqdm=False)[0]["token_ids"]
    assert llm.generate([prompt], GREEDY, use_tqdm=False)[0]["token_ids"] == want


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in {
        "temperature": [float("nan"), float("inf"), -0.1, 2.1, "0.7", None, True, Decimal("0.5")],
        "top_p": [0, 1e-50, 1.1, float("nan"), "1", None, True],
        "min_p": [-0.1, 1.1, float("nan"), None],
        "top_k": [-2, 2**31, 1.5, float("nan"), "5", None, True],
        "presence_penalty": [-2.1, 2.001, float("nan"), float("-inf"), 1e308, "0.5", None, True, Decimal("0.5")],
        "frequency_penalty": [-2.1, 2.001, float("nan"), float("inf"), 10**400, "0", None, False],
        "repetition_penalty": [0, 1e-50, -1, 10**400, float("nan"), float("inf"), 1e5, None],
        "seed": [2**63, 1.5, "1", True],
        "max_tokens": [0, -1, 2**31, 1.5, float("nan"), True],
        "stop_token_ids": ["3", [-1], [1.5], [True], 3, list(range(1025))],
        "n": [0], "stop": [[""]], "logprobs": [-2], "min_tokens": [-1],
        "ignore_eos": [1, None, "yes"],
        "detokenize": [1],
        "skip_special_tokens": [0],
    }.items() for value in values],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_sampling_params(field: str, value: object) -> None:
    """Wrong types, not-a-numbers and values out of range are refused when SamplingParams is made, naming the field."""
    with pytest.raises(InvalidRequest, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "options",
    [{"temperature": np.float32(0.5)}, {"top_k": -1}, {"top_k": np.int64(3)}, {"seed": -1}, {"max_tokens": None},
     {"temperature": 0.0, "top_k": 5, "top_p": 0.5}, {"stop_token_ids": []},
     {"n": 1, "stop": None, "presence_penalty": 0.0, "logprobs": None}, {"top_p": 1}, {"presence_penalty": 2},
     {"presence_penalty": np.float64(-2), "frequency_penalty": -0.0}, {"frequency_penalty": -2, "n": 2}, {"min_p": 1}],
    ids=str,
)  # fmt: skip
def test_sampling_params_accepted(llm: LLM, options: dict[str, object]) -> None:
    """The limits themselves, numpy numbers and None where it means something are fine."""
    params = SamplingParams(**options)
    (out,) = llm.generate(GOLDEN, params, use_tqdm=False)
    assert out.outputs[0].finish_reason in ("length", "stop")


def test_numpy_integers_do_not_overflow(llm: LLM, tmp_path: Path) -> None:
    """A length or a size is added and multiplied as the number it is, not wrapped at its type's end."""
    prompt = [1] * 40
    for limit in (np.int8(127), np.int32(2**31 - 1)):
        (out,) = llm.generate([prompt], SamplingParams(max_tokens=limit, ignore_eos=True), use_tqdm=False)
        assert len(out["token_ids"]) == 100 - len(prompt)  # to max_model_len
    save_checkpoint(tmp_path)
    with pytest.raises(InvalidRequest, match="too little memory: num_gpu_blocks_override = 2147483647 gives"):
        LLM(tmp_path, device="cpu", skip_tokenizer_init=True, num_gpu_blocks_override=np.int32(2**31 - 1))


def test_unknown_options_name_the_nearest(llm: LLM) -> None:
    """A misspelt option is an error that says what was meant; nothing is dropped silently."""
    with pytest.raises(TypeError, match=r"temprature.*did you mean 'temperature'"):
        SamplingParams(temprature=1)
    with pytest.raises(TypeError, match=r"max_num_seq'.*did you mean 'max_num_seqs'"):
        LLMEngine("anything", max_num_seq=8)


def test_parameters_may_be_set_until_they_are_handed_over(llm: LLM) -> None:
    """As scripts do with the model's defaults. What is set is checked; a request keeps what it was given."""
    params = llm.get_default_sampling_params()
    params.max_tokens, params.ignore_eos, params.stop_token_ids = 3, True, [7]
    assert params == SamplingParams(temperature=params.temperature, max_tokens=3, ignore_eos=True, stop_token_ids=(7,))
    with pytest.raises(InvalidRequest, match="top_p"):
        params.top_p = 2
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        params.max_token = 2
    params.stop_token_ids = None
    llm.enqueue(GOLDEN, params)
    params.max_tokens, params.logprobs = 5, 2
    (out,) = llm.wait_for_completion(use_tqdm=False)
    assert len(out["token_ids"]) == 3 and out.outputs[0].logprobs is None


def test_vllms_ways_to_make_parameters() -> None:
    """None asks for the default, -1 for no seed; what is set on a clone is its own."""
    params = SamplingParams.from_optional(n=None, top_p=0.5, max_tokens=None, seed=-1)
    assert params == SamplingParams(top_p=0.5) and params.max_tokens == 16
    other = params.clone()
    other.top_p = 0.25
    assert (params.top_p, other.top_p, other.seed) == (0.5, 0.25, None)


def test_parameters_keep_their_own_stop_tokens() -> None:
    """The caller's list may change after it was checked."""
    ids = [1, 2]
    params = SamplingParams(stop_token_ids=ids)
    ids.append("x")
    assert params.stop_token_ids == (1, 2)


def test_stop_token_out_of_vocabulary(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="stop_token_ids holds 199; the vocabulary has 199 ids"):
        llm.generate(GOLDEN, SamplingParams(stop_token_ids=[199]), use_tqdm=False)


def test_one_bad_prompt_of_many_queues_nothing(llm: LLM) -> None:
    """The whole list is checked first; the message names the index."""
    prompts = [GOLDEN] * 7 + [[]] + [GOLDEN] * 3
    with pytest.raises(InvalidRequest, match=r"prompts\[7\]: prompt is empty"):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_lengths_of_lists_must_agree(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 entries for 3 prompts"):
        llm.generate([GOLDEN] * 3, [GREEDY] * 2, use_tqdm=False)
    assert llm.generate([], [], use_tqdm=False) == []
    assert llm.generate([], use_tqdm=False) == []


def test_length_limits_are_exact(llm: LLM) -> None:
    """A prompt of max_model_len - 1 tokens gets one token; output stops at max_model_len whatever max_tokens says."""
    outs = llm.generate([[1] * 99, [1] * 98, [1]], SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outs] == [1, 2, 99]
    assert {out.outputs[0].finish_reason for out in outs} == {"length"}


def test_stop_tokens_and_eos(llm: LLM) -> None:
    """A stop token ends the request, is part of token_ids, and is named as the reason."""
    ids = llm.generate(GOLDEN, GREEDY, use_tqdm=False)[0]["token_ids"]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[ids[3]])
    (out,) = llm.generate(GOLDEN, params, use_tqdm=False)
    first = ids.index(ids[3])
    assert out.outputs[0].token_ids == ids[: first + 1]
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", ids[3])


def test_both_forms_of_add_request(llm: LLM) -> None:
    """vLLM's (request_id, prompt, params) and nano-vllm's (prompt, sampling_params), and keywords."""
    engine = llm.llm_engine
    assert engine.add_request("mine", GOLDEN, GREEDY) == "mine"
    assert engine.add_request("also mine", GOLDEN, params=GREEDY) == "also mine"
    given = engine.add_request(GOLDEN, GREEDY)
    named = engine.add_request(request_id="named", prompt=GOLDEN, params=GREEDY)
    mixed = engine.add_request("mixed", prompt=GOLDEN, params=GREEDY)
    with pytest.raises(TypeError, match="each once"):
        engine.add_request(GOLDEN, GREEDY, prompt=GOLDEN)
    with pytest.raises(InvalidRequest, match="request_id must be a string, got 7"):
        engine.add_request(7, GOLDEN, GREEDY)
    with pytest.raises(InvalidRequest, match="'mine' belongs to an unfinished request"):
        engine.add_request("mine", GOLDEN, GREEDY)
    done = {}
    while engine.has_unfinished_requests():
        done |= {out.request_id: out for out in engine.step()}
    assert done.keys() == {"mine", "also mine", given, named, mixed}
    assert len({tuple(out["token_ids"]) for out in done.values()}) == 1


def test_a_failed_step_fails_its_requests_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in the step ends with "error" and the cause; the engine serves the next request."""
    launch = llm.llm_engine.runner.launch
    calls = iter([False, True])

    def sometimes(chunks: list[object]) -> object:
        if next(calls, False):
            raise RuntimeError("the lights went out")
        return launch(chunks)

    monkeypatch.setattr(llm.llm_engine.runner, "launch", sometimes)
    outs = llm.generate([GOLDEN, [1, 2]], GREEDY, use_tqdm=False)
    assert [out.outputs[0].finish_reason for out in outs] == ["error", "error"]
    assert all("the lights went out" in out.error for out in outs)


def test_nan_logits_fail_that_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests in one step, NaN in the logits of one: the other's tokens do not change."""
    want = llm.generate(GOLDEN, GREEDY, use_tqdm=False)[0]["token_ids"]
    model = llm.llm_engine.runner.model
    logits = model.logits

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden)
        out[1:] = torch.nan
        return out

    monkeypatch.setattr(model, "logits", poisoned)
    first, second = llm.generate([GOLDEN, [1, 2, 3]], GREEDY, use_tqdm=False)
    assert first["token_ids"] == want
    assert second.outputs[0].finish_reason == "error"
    assert "not finite" in second.error


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_the_engine_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the middle of a step raises when the step is over; nothing of the call stays behind."""
    launch = llm.llm_engine.runner.launch
    steps = iter(range(100))

    def interrupted(chunks: list[object]) -> object:
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return launch(chunks)

    monkeypatch.setattr(llm.llm_engine.runner, "launch", interrupted)
    assert threading.current_thread() is threading.main_thread()
    for max_tokens in (50, 3):  # in the middle, and in the step that finishes them
        steps = iter(range(100))
        with pytest.raises(KeyboardInterrupt):
            llm.generate([GOLDEN] * 3, SamplingParams(max_tokens=max_tokens, ignore_eos=True), use_tqdm=False)
        assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("method", ["add", "abort"])
def test_ctrl_c_waits_for_the_books(llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Pressed while requests are queued, or again while they are given up: none is half in, none half out."""
    scheduler = llm.llm_engine.scheduler
    right = getattr(scheduler, method)

    def interrupted(seq: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        right(seq)

    def cut_off() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, method, interrupted)
    if method == "abort":
        monkeypatch.setattr(llm.llm_engine, "step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([GOLDEN], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not llm.llm_engine.has_unfinished_requests()


def test_abort_of_any_id_is_harmless(llm: LLM) -> None:
    """Waiting, running, unknown, twice: abort never raises and its output never comes."""
    engine = llm.llm_engine
    ids = [engine.add_request(GOLDEN, GREEDY) for _ in range(3)]
    engine.abort_request(ids[0])
    engine.step()
    engine.abort_request([ids[1], ids[1], "unknown"])
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [out.request_id for out in outputs] == [ids[2]]


def test_outputs_of_others_are_kept_for_them(llm: LLM) -> None:
    """generate() runs steps in which another caller's request may finish: that caller still gets it."""
    engine = llm.llm_engine
    other = engine.add_request([9, 9], SamplingParams(max_tokens=1))
    llm.generate(GOLDEN, GREEDY, use_tqdm=False)
    assert [out.request_id for out in engine.step()] == [other]


def test_seeds(llm: LLM) -> None:
    """The same seed gives the same tokens whatever runs beside it; no seed gives each request its own."""
    seeded = SamplingParams(seed=42, max_tokens=20, ignore_eos=True)
    alone = llm.generate(GOLDEN, seeded, use_tqdm=False)[0]["token_ids"]
    free = SamplingParams(max_tokens=20, ignore_eos=True)
    outs = llm.generate([GOLDEN] * 4, [free, seeded, free, free], use_tqdm=False)
    assert outs[1]["token_ids"] == alone
    assert len({tuple(out["token_ids"]) for out in outs}) == 4


def test_seeds_of_engines_and_requests_do_not_meet() -> None:
    """A request's own seed, and those made for others by engines with neighbouring seeds, are all different."""
    made = {derived_seed(engine, index) for engine in range(-20, 20) for index in range(100)}
    assert len(made) == 40 * 100
    assert all(0 <= seed < 2**64 for seed in made)
    assert not made & set(range(10000))


def test_two_engines_do_not_disturb_each_other(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Different block sizes and pools in one process; closing one leaves the other."""
    folder = tmp_path_factory.mktemp("other")
    save_checkpoint(folder)
    want = llm.generate(GOLDEN, GREEDY, use_tqdm=False)[0]["token_ids"]
    with LLM(folder, dtype="float32", device="cpu", skip_tokenizer_init=True, block_size=1) as other:
        assert other.generate(GOLDEN, GREEDY, use_tqdm=False)[0]["token_ids"] == want
        assert llm.generate(GOLDEN, GREEDY, use_tqdm=False)[0]["token_ids"] == want
    assert llm.generate(GOLDEN, GREEDY, use_tqdm=False)[0]["token_ids"] == want
    other.close()  # twice is fine
    with pytest.raises(EngineDead, match="closed"):
        other.generate(GOLDEN, GREEDY, use_tqdm=False)
    with pytest.raises(EngineDead, match="closed"):
        other.generate([], use_tqdm=False)


def test_cached_tokens_are_reported_and_salts_keep_apart(llm: LLM) -> None:
    """A repeated prompt comes from the cache but for its last token, for the same cache_salt only."""
    prompt = list(range(48))
    assert llm.llm_engine.reset_prefix_cache()
    cached = [
        llm.generate({"prompt_token_ids": prompt, "cache_salt": salt}, GREEDY, use_tqdm=False)[0].num_cached_tokens
        for salt in ("a", "a", "b", "")
    ]
    assert cached == [0, 47, 0, 0]


def test_own_ids_never_meet_automatic_ones(llm: LLM) -> None:
    """A caller may have taken the id that the counter comes to next."""
    engine = llm.llm_engine
    taken = engine.add_request(str(engine.num_sequences + 1), GOLDEN, GREEDY)
    (out,) = llm.generate(GOLDEN, GREEDY, use_tqdm=False)
    assert out.request_id != taken
    assert [other.request_id for other in engine.step()] == [taken]
