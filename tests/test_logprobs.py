"""Log probabilities, and what changes logits before a token is chosen, against Hugging Face's logits. Demo model."""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from nanoinfer import LLM, InvalidRequest, SamplingParams
from nanoinfer.outputs import RequestOutput

DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"
PROMPT = "def fibonacci(n):\n    if n"
OTHERS = ["class Stack:\n", "import os\n", "x"]
SCHEDULES: dict[str, dict[str, object]] = {
    "in lockstep": {},
    "a step ahead": {"async_scheduling": True},
    "budget 7, small pool": {
        "async_scheduling": True, "max_num_batched_tokens": 7, "num_gpu_blocks_override": 6, "max_model_len": -1,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=SCHEDULES)
def llm(request: pytest.FixtureRequest, device_name: str) -> Iterator[LLM]:
    with LLM(DEMO, dtype="float32", device=device_name, max_num_seqs=8, **SCHEDULES[request.param]) as llm:
        yield llm


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_name(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture(scope="module")
def hf() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@torch.inference_mode()
def true_logprobs(hf: Qwen2ForCausalLM, ids: list[int]) -> Tensor:
    """[positions, vocabulary]: of the token after each position."""
    return hf(torch.tensor([ids])).logits[0].log_softmax(-1)


def run(llm: LLM, prompt: object = PROMPT, **options: object) -> RequestOutput:
    """The request among others of the plain kind, whose tokens must not notice."""
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | options)
    alone = [out["token_ids"] for out in llm.generate(OTHERS, plain, use_tqdm=False)]
    outs = llm.generate([OTHERS[0], prompt, *OTHERS[1:]], [plain, params, plain, plain], use_tqdm=False)
    assert [out["token_ids"] for out in (outs[0], *outs[2:])] == alone
    return outs[1]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 3, "top_k": 40}, {"repetition_penalty": 1.5}], ids=str
)
def test_logprobs_are_the_models_own(llm: LLM, hf: Qwen2ForCausalLM, options: dict[str, object]) -> None:
    """Of the chosen token and the likeliest, with their ranks, whatever temperature, filters and penalties do."""
    out = run(llm, logprobs=3, **options)
    choice = out.outputs[0]
    truth = true_logprobs(hf, out.prompt_token_ids + choice.token_ids)[len(out.prompt_token_ids) - 1 :]
    assert len(choice.logprobs) == len(choice.token_ids)
    for told, token, true in zip(choice.logprobs, choice.token_ids, truth, strict=False):
        top = true.topk(3)
        assert next(iter(told)) == token and set(told) == {token, *top.indices.tolist()}
        for id_, each in told.items():
            assert each.logprob == pytest.approx(float(true[id_]), abs=1e-3)
            assert each.rank == int((true > true[id_]).sum()) + 1
            assert each.decoded_token == llm.llm_engine.tokenizer.decode([id_], False)
    total = sum(float(true[token]) for token, true in zip(choice.token_ids, truth, strict=False))
    assert choice.cumulative_logprob == pytest.approx(total, abs=1e-2)


def test_zero_logprobs_tell_of_the_token_alone(llm: LLM) -> None:
    choice = run(llm, logprobs=0).outputs[0]
    assert [list(told) for told in choice.logprobs] == [[token] for token in choice.token_ids]


@pytest.mark.parametrize("count", [2, 30, 5000, -1])
def test_an_engine_without_a_limit_tells_of_any_number(count: int) -> None:
    """max_logprobs=-1; of no more ids than there are tokens."""
    with LLM(DEMO, device="cpu", max_logprobs=-1) as llm:
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=count, prompt_logprobs=count)
        (out,) = llm.generate(PROMPT, params, use_tqdm=False)
        wanted = llm.llm_engine.tokenizer.size if count < 0 else min(count, llm.llm_engine.tokenizer.size)
    for told in (*out.outputs[0].logprobs, *out.prompt_logprobs[1:]):
        assert len(told) in (wanted, wanted + 1)
        assert {entry.rank for entry in told.values()} >= set(range(1, wanted + 1))


@pytest.mark.parametrize("length", [1, 2, 16, 40])
def test_prompt_logprobs(llm: LLM, hf: Qwen2ForCausalLM, length: int) -> None:
    """Of every prompt token but the first, whole or in chunks, and from no cache, which has no logits."""
    ids = [(7 * i) % 500 + 3 for i in range(length)]
    for _ in range(2):
        out = run(llm, ids, prompt_logprobs=2, max_tokens=1)
        truth = true_logprobs(hf, ids)
        assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == length
        for told, token, true in zip(out.prompt_logprobs[1:], ids[1:], truth, strict=False):
            assert set(told) == {token, *true.topk(2).indices.tolist()}
            assert told[token].logprob == pytest.approx(float(true[token]), abs=1e-3)


def test_what_is_told_is_used_like_a_list(llm: LLM) -> None:
    """As scripts for vLLM use theirs: places, slices, sums, comparison, JSON, copies and what another process gets."""
    out = run(llm, logprobs=1, prompt_logprobs=0, max_tokens=5)
    told = out.outputs[0].logprobs
    plain = list(told)
    assert len(plain) == len(told) == 5 and told and not told[5:]
    assert told == plain and plain == told and told != plain[1:] and told[:] == told and told is not None
    assert told[-1] == plain[-1] == told[4] and told[1:4:2] == plain[1:4:2] and list(reversed(told)) == plain[::-1]
    assert told + told == told + plain == plain + told == plain * 2
    assert plain[0] in told and told.index(plain[2]) == 2
    with pytest.raises(IndexError):
        told[5]
    receiver, sender = Pipe(duplex=False)
    sender.send(out)
    for again in (copy.deepcopy(out), receiver.recv()):
        assert again == out and type(again.outputs[0].logprobs) is list
    assert json.loads(json.dumps(asdict(out)))["outputs"][0]["logprobs"][2] == {
        str(id_): list(entry) for id_, entry in plain[2].items()
    }


def test_streams_tell_of_new_tokens_alone(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=1)
    whole = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
    told = [each for delta in llm.stream(PROMPT, params) for each in delta.outputs[0].logprobs]
    assert told == whole.logprobs


@torch.inference_mode()
def greedy(hf: Qwen2ForCausalLM, ids: list[int], count: int, change) -> list[int]:
    """Greedy tokens with `change(logits, output so far)` applied to every row of logits."""
    output: list[int] = []
    for _ in range(count):
        logits = hf(torch.tensor([ids + output])).logits[0, -1].clone()
        output.append(int(change(logits, output).argmax()))
    return output


def encode(llm: LLM, text: str) -> list[int]:
    return llm.llm_engine.tokenizer.encode(text)


def test_logit_bias(llm: LLM, hf: Qwen2ForCausalLM) -> None:
    """Added before the choice; keys may be strings, as JSON has them."""
    plain = run(llm)
    liked, disliked = 77, plain["token_ids"][0]
    bias = {liked: 6.5, str(disliked): -100}

    def change(logits: Tensor, output: list[int]) -> Tensor:
        logits[liked] += 6.5
        logits[disliked] -= 100
        return logits

    out = run(llm, logit_bias=bias)
    assert out["token_ids"] == greedy(hf, out.prompt_token_ids, 12, change) != plain["token_ids"]


def test_options_that_leave_no_id_are_named(llm: LLM) -> None:
    """Only the model can tell that the one id allowed is no token's, or banned: an error, and no other request's."""
    for options in {"allowed_token_ids": [4090]}, {"allowed_token_ids": encode(llm, "x"), "bad_words": ["x"]}:
        out = run(llm, **options)
        assert out.outputs[0].finish_reason == "error" and out.error.endswith("or its options leave no id")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_allowed_token_ids(llm: LLM, temperature: float) -> None:
    allowed = [5, 90, 300, 7]
    out = run(llm, allowed_token_ids=allowed, temperature=temperature, seed=1)
    assert set(out["token_ids"]) <= set(allowed)
    assert run(llm, allowed_token_ids=[9], temperature=temperature)["token_ids"] == [9] * 12


def test_min_tokens_holds_off_every_end(llm: LLM, hf: Qwen2ForCausalLM) -> None:
    """Stop ids are not chosen and stop strings not looked for before; from then on they are."""
    plain = run(llm)
    stop = plain["token_ids"][2]
    assert len(run(llm, stop_token_ids=[stop])["token_ids"]) <= 3
    out = run(llm, stop_token_ids=[stop], min_tokens=6)
    assert len(out["token_ids"]) >= 6 and stop not in out["token_ids"][:6]
    text = plain["text"][2:4]
    assert len(run(llm, stop=text)["token_ids"]) < 6
    assert len(run(llm, stop=text, min_tokens=9)["token_ids"]) >= 9


def test_bad_words(llm: LLM) -> None:
    """Neither a word of one token nor the end of one of several, after a space or not."""
    plain = run(llm, max_tokens=20)
    tokens = plain["token_ids"]
    tokenizer = llm.llm_engine.tokenizer
    words = [
        tokenizer.decode(tokens[4:5], True).strip() or "self",
        tokenizer.decode(tokens[6:9], True).strip() or "return",
    ]
    out = run(llm, bad_words=words, max_tokens=20)
    for word in words:
        for ids in (encode(llm, word), encode(llm, " " + word)):
            pieces = [out["token_ids"][i : i + len(ids)] for i in range(20)]
            assert ids not in pieces
    assert out["token_ids"] != tokens


def test_processors_see_every_token(llm: LLM, hf: Qwen2ForCausalLM) -> None:
    """Both forms, in order, with all of the output so far, also where steps are launched ahead."""
    seen: list[list[int]] = []

    def no_repeats(output: list[int], logits: Tensor) -> Tensor:
        seen.append(list(output))
        logits[output] = -torch.inf
        return logits

    def prompt_too(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        logits[prompt] -= 3
        return logits

    out = run(llm, logits_processors=[no_repeats, prompt_too])
    ids = out["token_ids"]
    assert [output for output in seen if output == ids[: len(output)]][-1] == ids[:-1]

    def change(logits: Tensor, output: list[int]) -> Tensor:
        return prompt_too(out.prompt_token_ids, output, no_repeats(output, logits))

    assert ids == greedy(hf, out.prompt_token_ids, 12, change) and len(set(ids)) == 12


def test_a_line_break_may_be_a_bad_word(llm: LLM) -> None:
    """It is no blank before a word that is empty."""
    plain, out = run(llm), run(llm, bad_words=["\n"])
    assert encode(llm, "\n")[0] in plain["token_ids"] and encode(llm, "\n")[0] not in out["token_ids"]
    assert encode(llm, " ")[0] in run(llm, bad_words=["\n"], allowed_token_ids=encode(llm, " "))["token_ids"]


def raising(output: list[int], logits: Tensor) -> Tensor:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("processor", "message", "count"),
    [(raising, "KeyError('no such thing')", 0), (lambda output, logits: None, "), got NoneType", 0),
     (lambda output, logits: logits.max(), "), got ()", 0), (lambda logits: logits, "TypeError", 0),
     (lambda output, logits: raising(output, logits) if len(output) == 3 else logits, "KeyError", 3)],
    ids=["raises", "returns nothing", "returns a number", "takes too little", "raises later"],
)  # fmt: skip
def test_a_processor_that_fails_fails_its_request_alone(llm: LLM, processor, message: str, count: int) -> None:
    """The cause is on that output, with the tokens before it; the requests beside it do not notice (`run`)."""
    out = run(llm, logits_processors=[processor])
    assert out.outputs[0].finish_reason == "error" and message in out.error and "logits processor" in out.error
    assert len(out["token_ids"]) == count


def test_processors_see_all_of_a_models_ids(device: str) -> None:
    """Masks are made for config.json's vocabulary; an id that no token has stays out, whatever a mask gives it."""
    mask = torch.zeros(4096, device=device)
    mask[4090] = 1000
    params = SamplingParams(temperature=0, max_tokens=5, logits_processors=[lambda output, logits: logits + mask])
    with LLM(DEMO, device=device, num_gpu_blocks_override=9, max_model_len=-1) as demo:
        plain = demo.generate("def f(", SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
        masked = demo.generate("def f(", params, use_tqdm=False)
    assert masked[0]["token_ids"] == plain[0]["token_ids"]


def test_a_processor_may_carry_values_of_its_own(llm: LLM) -> None:
    """As defaults or bound by partial, the ways to make one in a loop; neither is taken for the prompt's place."""

    def only(output: list[int], logits: Tensor, token: int = 7) -> Tensor:
        return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor([token], device=logits.device), 1.0)

    assert run(llm, logits_processors=[only])["token_ids"] == [7] * 12
    assert run(llm, logits_processors=[partial(only, token=9)])["token_ids"] == [9] * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [({"logprobs": -2}, "logprobs"), ({"logprobs": 1.5}, "logprobs"), ({"prompt_logprobs": "1"}, "prompt_logprobs"),
     ({"min_tokens": -1}, "min_tokens"), ({"min_tokens": 17}, "min_tokens must be at most max_tokens = 16, got 17"),
     ({"logit_bias": {1: 101}}, "logit_bias"), ({"logit_bias": {1.5: 1}}, "logit_bias"),
     ({"logit_bias": {-1: 1}}, "logit_bias"), ({"logit_bias": {1: float("nan")}}, "logit_bias"),
     ({"allowed_token_ids": []}, "at least 1 id"), ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
     ({"bad_words": "x"}, "bad_words"), ({"bad_words": [""]}, "bad_words"), ({"bad_words": [1]}, "bad_words"),
     ({"logits_processors": [1]}, "logits_processors must be callables")],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"logprobs": 21}, "logprobs must be at most max_logprobs = 20, got 21"),
     ({"prompt_logprobs": -1}, "prompt_logprobs must be at most max_logprobs"),
     ({"logit_bias": {10**6: 1}}, "logit_bias holds 1000000"), ({"allowed_token_ids": [10**6]}, "allowed_token_ids")],
    ids=str,
)  # fmt: skip
def test_what_this_model_cannot_do_is_refused(llm: LLM, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(PROMPT, SamplingParams(**options), use_tqdm=False)
