"""Scripts written for vLLM and nano-vllm run with their import changed: the calls they make, on the demo model."""

from pathlib import Path
from random import Random

import pytest

from nanoinfer import LLM, EngineArgs, InvalidRequest, LLMEngine, RequestOutput, SamplingParams, TokensPrompt

DEMO = str(Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo")


def test_vllms_quick_start() -> None:
    """Prompts in, outputs in their order, each with its prompt and text."""
    prompts = ["def main():", "import os", "class Stack:", "x = "]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
    llm = LLM(model=DEMO)
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt == prompt
        assert isinstance(output.outputs[0].text, str) and output.outputs[0].text
        assert len(output.outputs[0].token_ids) == 16  # vLLM's default of max_tokens
    llm.close()


def test_vllms_engine_loop() -> None:
    """EngineArgs, ids of one's own, steps until nothing is left."""
    engine = LLMEngine.from_engine_args(EngineArgs(model=DEMO, max_num_seqs=2, seed=0, disable_log_stats=False))
    waiting = [("def f(x):", SamplingParams(temperature=0.0)), ("import", SamplingParams(n=2, temperature=0.8, seed=5))]
    outputs: list[RequestOutput] = []
    request_id = 0
    while waiting or engine.has_unfinished_requests():
        if waiting:
            prompt, params = waiting.pop(0)
            engine.add_request(str(request_id), prompt, params)
            request_id += 1
        outputs += [output for output in engine.step() if output.finished]
    assert {output.request_id: len(output.outputs) for output in outputs} == {"0": 1, "1": 2}
    engine.close()
    with pytest.raises(InvalidRequest, match="max_num_seqs"):
        EngineArgs(model=DEMO, max_num_seqs=0)


def test_nano_vllms_example_and_bench() -> None:
    """Dicts with "text" and "token_ids"; token ids in, one SamplingParams each."""
    llm = LLM(DEMO, enforce_eager=True, tensor_parallel_size=1)
    outputs = llm.generate(["def add(a, b):"], SamplingParams(temperature=0.6, max_tokens=20))
    assert isinstance(outputs[0]["text"], str) and len(outputs[0]["token_ids"]) <= 20
    rng = Random(0)
    prompts = [[rng.randint(0, 1000) for _ in range(rng.randint(10, 60))] for _ in range(16)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=rng.randint(5, 20)) for _ in prompts]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [param.max_tokens for param in params]
    llm.close()


def test_what_research_scripts_pass_along() -> None:
    """Options and prompts as lm-eval and TRL hand them over, and what lm-eval reads of a prompt's log probabilities."""
    llm = LLM(
        model=DEMO, revision=None, dtype="auto", tokenizer=None, tokenizer_mode="auto", tokenizer_revision=None,
        trust_remote_code=False, tensor_parallel_size=1, max_model_len=2048, max_num_seqs=None, quantization=None,
        swap_space=4, seed=1234, enable_lora=False, max_lora_rank=16, gpu_memory_utilization=0.9,
        max_num_batched_tokens=4096, logprobs_mode="raw_logprobs", enable_sleep_mode=False,
    )  # fmt: skip
    assert llm.llm_engine.model_config.max_model_len == llm.model_config.max_model_len == 2048
    params = [SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)] * 2
    prompts = [TokensPrompt(prompt_token_ids=[5, 6, 7])] * 2
    outputs = llm.generate(prompts, sampling_params=params, use_tqdm=False, lora_request=None)
    for output in outputs:
        assert len(output.outputs[0].token_ids) == 1
        assert output.prompt_logprobs[0] is None
        for token, told in zip([6, 7], output.prompt_logprobs[1:], strict=True):
            assert told[token].logprob < 0 and 1 <= len(told) <= 2
            assert (max(told, key=lambda id_: told[id_].logprob) == token) == (told[token].rank == 1)
    assert llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)[0].finished
    assert llm.reset_prefix_cache()
    with pytest.raises(InvalidRequest, match="lora_request must be one of None, got 1"):
        llm.generate(prompts, lora_request=1)
    with pytest.raises(TypeError, match=r"LLM\.generate has no option 'use_tqmd'; did you mean 'use_tqdm'"):
        llm.generate(prompts, use_tqmd=False)
    assert llm.get_tokenizer().encode("def") and llm.get_default_sampling_params().temperature is not None
    llm.close()
