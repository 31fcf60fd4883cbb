"""Every option of SamplingParams, alone and with every other, in one batch of requests that all differ.

What each request gives is compared with a reference in plain torch: Hugging Face's logits, changed and cut as the
options say, one row at a time.
"""

from collections import Counter
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from nanoinfer import LLM, SamplingParams, reference
from nanoinfer.outputs import CompletionOutput, RequestOutput
from nanoinfer.utils.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"
COMMON = [13, 10, 11, 262, 263, 285, 290, 300, 310, 320, 345, 400, 466, 511, 626, 700]


def less_of_the_same(output: list[int], logits: Tensor) -> Tensor:
    logits[output] -= 1.5
    return logits


def less_of_the_prompt(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
    logits[prompt] -= len(output)
    return logits


OPTIONS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0},
    "hot": {"temperature": 1.8},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "presence_penalty": {"presence_penalty": 1.0},
    "frequency_penalty": {"frequency_penalty": -0.7},
    "logit_bias": {"logit_bias": {300: 4.0, 13: -6, "345": 2.5}},
    "allowed_token_ids": {"allowed_token_ids": COMMON},
    "bad_words": {"bad_words": ["self", " return", "if not"]},
    "logits_processors": {"logits_processors": [less_of_the_same, less_of_the_prompt]},
    "stop_token_ids": {"stop_token_ids": COMMON[3:7]},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": COMMON[:2]},
    "eos": {"ignore_eos": False},
    "stop": {"stop": ["(", "\n  ", "s"]},
    "include_stop": {"stop": [")", "e"], "include_stop_str_in_output": True},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "n": {"n": 2},
    "max_tokens": {"max_tokens": 14},
    "detokenize": {"detokenize": False},
    "skip_special_tokens": {"skip_special_tokens": False},
}
# Refused, each with a message of its own: equal completions, and a text to look for in none.
IMPOSSIBLE = [{"greedy", "n"}, {"stop", "detokenize"}, {"include_stop", "detokenize"}]


def requests() -> list[tuple[str, list[int], SamplingParams]]:
    """Name, prompt and parameters of each."""
    chosen = [{name} for name in OPTIONS] + [{*pair} for pair in combinations(OPTIONS, 2) if {*pair} not in IMPOSSIBLE]
    made = []
    for i, names in enumerate(chosen):
        options: dict[str, object] = {"seed": i, "max_tokens": 8, "ignore_eos": True}
        for name in sorted(names):
            options |= OPTIONS[name]
        prompt = [(31 * i + 7 * j) % 900 + 8 for j in range(2 + i % 9)]
        made.append((" and ".join(sorted(names)), prompt, SamplingParams(**options)))
    return made


def test_every_pair_of_options(device: str) -> None:
    """Each request's tokens, end, text and log probabilities are the reference's."""
    hf = Qwen2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    asked = requests()
    with LLM(DEMO, dtype="float32", device=device, max_num_seqs=64) as llm:
        outs = llm.generate([prompt for _, prompt, _ in asked], [params for *_, params in asked], use_tqdm=False)
        engine = llm.llm_engine
        assert engine.blocks.num_free == engine.blocks.num_blocks
        eos = engine.model_config.eos_token_ids
    for (name, prompt, params), out in zip(asked, outs, strict=True):
        assert out.error is None and len(out.outputs) == params.n, name
        for choice in out.outputs:
            try:
                check(hf, engine.tokenizer, prompt, params, out, choice, frozenset(() if params.ignore_eos else eos))
            except AssertionError as error:
                raise AssertionError(f"{name}, completion {choice.index}: {error}") from error


@torch.inference_mode()
def check(
    hf: Qwen2ForCausalLM, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams, out: RequestOutput,
    choice: CompletionOutput, eos: frozenset[int],
) -> None:  # fmt: skip
    ids = choice.token_ids
    logits = hf(torch.tensor([prompt + ids]), use_cache=False).logits[0, :-1, : tokenizer.size]
    if params.prompt_logprobs is not None:
        assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(prompt)
        check_told(out.prompt_logprobs[1:], prompt[1:], logits, params.prompt_logprobs)
    assert (choice.logprobs is None) == (params.logprobs is None)
    logits = logits[len(prompt) - 1 :]
    if params.logprobs is not None:
        check_told(choice.logprobs, ids, logits, params.logprobs)
    banned = words(tokenizer, params)
    for place, token in enumerate(ids):
        row = changed(logits[place].clone(), params, prompt, ids[:place], banned, eos)
        check_chosen(row.double(), token, params, params.seed + choice.index, len(prompt) + place)
    check_end(tokenizer, choice, params, eos)


def check_told(told: object, ids: list[int], logits: Tensor, count: int) -> None:
    assert len(told) == len(ids)
    for each, token, row in zip(told, ids, logits, strict=False):
        truth = row.log_softmax(0)
        assert set(each) == {token, *truth.topk(count).indices.tolist()}
        assert all(abs(entry.logprob - float(truth[id_])) < 1e-3 for id_, entry in each.items())
        assert each[token].rank == int((truth > truth[token]).sum()) + 1


def words(tokenizer: Tokenizer, params: SamplingParams) -> list[list[int]]:
    return [tokenizer.encode(space + word.lstrip()) for word in params.bad_words or () for space in ("", " ")]


def changed(
    row: Tensor, params: SamplingParams, prompt: list[int], output: list[int], banned: list[list[int]],
    eos: frozenset[int],
) -> Tensor:  # fmt: skip
    """One row of logits after what its request asks for."""
    if params.allowed_token_ids:
        out_of_it = [id_ for id_ in range(len(row)) if id_ not in params.allowed_token_ids]
        row[out_of_it] = -torch.inf
    for id_, bias in (params.logit_bias or {}).items():
        row[id_] += bias
    if len(output) < params.min_tokens:
        row[[*eos, *(params.stop_token_ids or ())]] = -torch.inf
    for word in banned:
        if (prompt + output)[-len(word) :][1 - len(word) :] == word[:-1] or len(word) == 1:
            row[word[-1]] = -torch.inf
    for process in params.logits_processors or ():
        row = process(output, row) if process is less_of_the_same else process(prompt, output, row)
    for id_ in {*prompt, *output}:
        row[id_] = row[id_] / params.repetition_penalty if row[id_] > 0 else row[id_] * params.repetition_penalty
    for id_, count in Counter(output).items():
        row[id_] -= params.frequency_penalty * count + params.presence_penalty
    return row


def check_chosen(row: Tensor, token: int, params: SamplingParams, seed: int, length: int) -> None:
    """The token's share of the probabilities is where the row's random number lies, but for float32's rounding."""
    if params.temperature == 0:
        assert row.max() - row[token] < 1e-3
        return
    weights = reference.keep_weights(row / params.temperature, params.top_k, params.top_p, params.min_p)
    above = weights.cumsum(0) / weights.sum()
    number = reference.uniform(seed & 0xFFFFFFFF, seed >> 32, length)
    low, high = float(above[token] - weights[token] / weights.sum()), float(above[token])
    assert weights[token] > 0 and low - 1e-4 <= number <= high + 1e-4, f"{number} is not in [{low}, {high}]"


def check_end(tokenizer: Tokenizer, choice: CompletionOutput, params: SamplingParams, eos: frozenset[int]) -> None:
    """It went on exactly until something ended it; the text is what came before that."""
    ids, ends = choice.token_ids, eos | {*(params.stop_token_ids or ())}
    for count in range(1, len(ids) + 1):
        text, stop = cut(tokenizer, ids[:count], params)
        by_id = ids[count - 1] in ends
        reason = "stop" if stop or by_id else "length" if count == params.max_tokens else None
        assert (reason is not None) == (count == len(ids)), f"ended after {len(ids)} tokens, not {count}"
    assert choice.finish_reason == reason
    assert choice.stop_reason == (stop or (ids[-1] if by_id and ids[-1] not in eos else None))
    if by_id and not stop and not params.include_stop_str_in_output:
        text = tokenizer.decode(ids[:-1], params.skip_special_tokens)
    assert choice.text == (text if params.detokenize else "")


def cut(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[str, str | None]:
    """The text up to the first stop string that ends after min_tokens tokens, and that stop string."""
    text = tokenizer.decode(ids, params.skip_special_tokens)
    early = len(tokenizer.decode(ids[: params.min_tokens], params.skip_special_tokens))
    for end in range(early + 1, len(text) + 1):
        for stop in sorted(params.stop, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if params.include_stop_str_in_output else end - len(stop)], stop
    return text, None
