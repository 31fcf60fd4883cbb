"""What requests want beside tokens costs what they ask for: in the steps that need it, once, only of what is new."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest

from nanoinfer import LLM, SamplingParams
from nanoinfer.engine import model_runner
from nanoinfer.engine.special import Special
from nanoinfer.ops import FEW

DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"
PROMPT = "def fibonacci(n):\n    if n"


@pytest.fixture(scope="module", params=[False, True], ids=["lockstep", "a step ahead"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(DEMO, dtype="float32", device="cpu", max_num_seqs=8, async_scheduling=request.param) as llm:
        yield llm


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Special]:
    """Those of the steps that did anything beside tokens."""
    made = list[Special]()

    def make(*args: object) -> Special:
        made.append(Special(*args))
        return made[-1]

    monkeypatch.setattr(model_runner, "Special", make)
    return made


def params(**options: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 0), ({"min_tokens": 4}, 4), ({"prompt_logprobs": 1}, 1), ({"prompt_logprobs": 0, "min_tokens": 3}, 3),
     ({"logprobs": 0}, 12), ({"logit_bias": {5: 1.0}}, 12), ({"temperature": 1.0, "top_p": 0.5, "min_p": 0.1}, 0),
     ({"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2, "seed": 3}, 0)],
    ids=str,
)  # fmt: skip
def test_steps_are_special_only_as_long_as_needed(
    llm: LLM, steps: list[Special], options: dict[str, object], expected: int
) -> None:
    """min_tokens until there are so many, a prompt's log probabilities with its prompt; filters and penalties never."""
    llm.generate(PROMPT, params(**options), use_tqdm=False)
    assert len(steps) == expected


@pytest.mark.parametrize("also", [{}, {"logprobs": 0}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_min_tokens_is_exact(llm: LLM, count: int, also: dict[str, object]) -> None:
    """Where nothing but an end is likely, it comes right after so many other tokens."""
    want = params(allowed_token_ids=[5, 6], logit_bias={6: 100}, stop_token_ids=[6], min_tokens=count, **also)
    assert llm.generate(PROMPT, want, use_tqdm=False)[0]["token_ids"] == ([5] * count + [6])[:12]


def test_requests_are_told_of_together(llm: LLM, steps: list[Special]) -> None:
    """One group for all that want few likeliest ids, whatever their numbers; each gets as many as it asked for."""
    counts = [0, 3, 5, 20, None, 1]
    outs = llm.generate([PROMPT] * 6, [params(logprobs=count) for count in counts], use_tqdm=False)
    assert all(len(each.told) == 1 for each in steps) and max(counts[:4]) <= FEW
    for out, count in zip(outs, counts, strict=True):
        told = out.outputs[0].logprobs
        assert (told is None) == (count is None)
        assert all(max(count, 1) <= len(each) <= count + 1 for each in told or ())


@pytest.mark.parametrize("changed", [[False, True, False], [True, False, True], [False, False, True, True]], ids=str)
def test_changed_logits_are_kept_apart_from_others(llm: LLM, changed: list[bool]) -> None:
    """Penalties and biases of one request reach neither its own log probabilities nor those told of beside it."""
    want = [params(logprobs=3, **({"repetition_penalty": 3.0, "logit_bias": {300: 9.0}} if change else {}))
            for change in changed]  # fmt: skip
    together = llm.generate([PROMPT] * len(want), want, use_tqdm=False)
    for out, each in zip(together, want, strict=True):
        alone = llm.generate(PROMPT, each, use_tqdm=False)[0].outputs[0]
        assert out.outputs[0].token_ids == alone.token_ids
        for told, single in zip(out.outputs[0].logprobs, alone.logprobs, strict=True):
            assert told.keys() == single.keys()
            assert all(told[id_].logprob == pytest.approx(single[id_].logprob, abs=1e-4) for id_ in told)


def test_one_set_of_prompt_logprobs_for_all_choices(llm: LLM, steps: list[Special]) -> None:
    """They are the prompt's: computed with the first choice, shown once, and the same as of a single one."""
    (one,) = llm.generate(PROMPT, params(prompt_logprobs=2), use_tqdm=False)
    steps.clear()
    (out,) = llm.generate(PROMPT, params(prompt_logprobs=2, n=5, temperature=1.0), use_tqdm=False)
    assert [list(each or ()) for each in out.prompt_logprobs] == [list(each or ()) for each in one.prompt_logprobs]
    assert len(out.outputs) == 5
    assert sum(len(told.numbers) for each in steps for *_, told in each.prompt_told) == len(out.prompt_token_ids) - 1


def test_a_stream_tells_of_each_token_once(llm: LLM) -> None:
    """A delta has what is new; sums go on from the last one."""
    want = params(max_tokens=40, logprobs=2, prompt_logprobs=1)
    (whole,) = llm.generate(PROMPT, want, use_tqdm=False)
    running, dicts = 0.0, []
    for delta in llm.stream(PROMPT, want):
        (choice,) = delta.outputs
        running += sum(told[token].logprob for token, told in zip(choice.token_ids, choice.logprobs, strict=True))
        assert choice.cumulative_logprob == pytest.approx(running, abs=1e-4)
        assert delta.prompt_logprobs == whole.prompt_logprobs
        dicts += choice.logprobs
    assert dicts == whole.outputs[0].logprobs and len(dicts) == 40
    assert whole.outputs[0].cumulative_logprob == pytest.approx(running, abs=1e-4)


def test_dicts_are_made_of_what_is_read(llm: LLM) -> None:
    """They read as a list: by index and slice, in order, compared, printed."""
    tokenizer = llm.llm_engine.tokenizer
    (out,) = llm.generate(PROMPT, params(logprobs=2, temperature=1.0, seed=4), use_tqdm=False)
    told = out.outputs[0].logprobs
    dicts = [*told]
    assert len(told) == len(dicts) == 12 and told == dicts and told[3:5] == dicts[3:5] and told[-1] == dicts[-1]
    assert told != dicts[1:] and told != dicts[::-1]
    assert all(each.decoded_token == tokenizer.decode([id_], False) for place in told for id_, each in place.items())
    assert repr(told) == repr(dicts)
    for copy in (deepcopy(told), asdict(out)["outputs"][0]["logprobs"]):
        assert type(copy) is list and copy == dicts
    with pytest.raises(IndexError):
        told[12]
