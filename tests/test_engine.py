"""The engine gives Hugging Face's tokens, whatever the schedule."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_checkpoint
from transformers import Qwen2ForCausalLM

from nanoinfer import LLM, LLMEngine, SamplingParams
from nanoinfer.engine.sequence import Sequence

DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
# (heads, kv heads, head dim) of the 0.5B, 1.5B and 7B models; hidden size and layers are cut.
LAYOUTS = {"0.5b": (14, 2, 64, True), "1.5b": (12, 2, 128, True), "7b": (28, 4, 128, False)}
LENGTHS = [1, 2, 15, 16, 17, 33, 64, 100, 5]
# Pools that hold the longest request and little more: the others, growing, push each other out.
SMALL_POOL = {"num_gpu_blocks_override": 9, "max_model_len": -1}
# Each limit alone is odd; every one must leave the tokens as they are.
SCHEDULES: dict[str, dict[str, object]] = {
    "all at once": {},
    "one at a time": {"max_num_seqs": 1},
    "budget 7": {"max_num_batched_tokens": 7},
    "block size 1": {"block_size": 1},
    "small pool": SMALL_POOL,
    "small pool, block size 1": {**SMALL_POOL, "num_gpu_blocks_override": 145, "block_size": 1},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 64},
    "a step ahead": {"async_scheduling": True},
    "in lockstep": {"async_scheduling": False},
    "without graphs": {"enforce_eager": True},
    "a step ahead, small pool, budget 7": {**SMALL_POOL, "async_scheduling": True, "max_num_batched_tokens": 7},
}
GPU_ALONE = [SCHEDULES["in lockstep"], SCHEDULES["without graphs"]]


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    hf: Qwen2ForCausalLM


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    heads, kv_heads, head_dim, tied = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    hf = save_checkpoint(
        folder, vocab_size=503, hidden_size=192, intermediate_size=320, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=4096, tie_word_embeddings=tied,
    )  # fmt: skip
    yield Checkpoint(folder, hf)


def make_llm(folder: Path, device: str, schedule: dict[str, object], **options: object) -> LLM:
    if device == "cpu" and schedule in GPU_ALONE:
        pytest.skip("the default on a CPU")
    return LLM(folder, dtype="float32", device=device, **schedule, **options)


def make_prompts(lengths: list[int], vocab_size: int = 503) -> list[list[int]]:
    """Prompts of which the later ones begin as the earlier ones do, so that a cache has something to share."""
    generator = torch.Generator().manual_seed(1)
    stem = torch.randint(0, vocab_size, (max(lengths),), generator=generator).tolist()
    fresh = torch.randint(0, vocab_size, (max(lengths),), generator=generator).tolist()
    return [(stem if i % 3 else fresh)[:length] for i, length in enumerate(lengths)]


@torch.inference_mode()
def check_greedy(hf: Qwen2ForCausalLM, prompt: list[int], generated: list[int], *, exact: bool = False) -> int:
    """Each generated token is Hugging Face's choice at its place, given all before it; the number of ties.

    Unless exact, another token passes where the float64 margin to the best is below twice the float32 error there:
    then the two are equal as far as float32 can tell.
    """
    ids = torch.tensor([prompt + generated])
    logits = hf(ids, use_cache=False, logits_to_keep=len(generated) + 1).logits[0, :-1]
    chosen = torch.tensor(generated)
    differing = (logits.argmax(-1) != chosen).nonzero().flatten().tolist()
    if differing and not exact:
        true = hf.double()(ids, use_cache=False, logits_to_keep=len(generated) + 1).logits[0, :-1]
        hf.float()
        for i in differing:
            margin, error = true[i].max() - true[i, chosen[i]], (true[i] - logits[i]).abs().max()
            assert margin < 2 * error, (
                f"token {i}: {generated[i]}, expected {int(true[i].argmax())}; margin {margin:.2e}"
            )
        print(f"{len(differing)} ties of {len(generated)} tokens")
        return len(differing)
    assert not differing, f"tokens {differing} differ from Hugging Face's"
    return 0


def check_nothing_kept(llm: LLM) -> None:
    """At the end every block and every row is back."""
    engine = llm.llm_engine
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert set(engine.blocks.ref_counts) == {0}
    assert sorted(engine.scheduler.free_rows) == list(range(2 * engine.config.max_num_seqs))
    assert not engine.has_unfinished_requests()


def generate(engine: LLMEngine, prompts: list[Any], params: SamplingParams) -> list[Sequence]:
    """Run prompts to their end; what became of each, preemptions included."""
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    sequences = [engine.replies[request_id].seqs[0] for request_id in ids]
    while engine.has_unfinished_requests():
        engine.step()
    assert [seq.finish_reason for seq in sequences] == ["length"] * len(prompts)
    return sequences


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_are_those_of_hugging_face(checkpoint: Checkpoint, device: str, schedule: str) -> None:
    """Batching, chunking, preemption, block sizes, cold and cached: none changes a greedy token in fp32."""
    prompts, small = make_prompts(LENGTHS), "small pool" in schedule
    params = replace(GREEDY, max_tokens=40) if small else GREEDY  # long enough to outgrow the pool
    with make_llm(checkpoint.folder, device, SCHEDULES[schedule], skip_tokenizer_init=True) as llm:
        runs = [generate(llm.llm_engine, prompts, params) for _ in range(2)]
        check_nothing_kept(llm)
    for run in runs:
        assert any(seq.num_preemptions for seq in run) == small, "a schedule must do what its name says"
    cold, cached = ([seq.output_tokens for seq in run] for run in runs)
    ties = 0
    for prompt, first, second in zip(prompts, cold, cached, strict=True):
        ties += check_greedy(checkpoint.hf, prompt, first)
        if second != first:
            ties += check_greedy(checkpoint.hf, prompt, second)
    assert ties <= 2, "random models may tie now and then, not often"


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 512}, {"block_size": 256}], ids=str)
def test_long_prompts(checkpoint: Checkpoint, device: str, options: dict[str, object]) -> None:
    """Prompts of up to 3,000 tokens, whole and in chunks, beside short ones."""
    prompts = make_prompts([3000, 1, 1027, 2048])
    with make_llm(checkpoint.folder, device, options, skip_tokenizer_init=True) as llm:
        for prompt, out in zip(prompts, llm.generate(prompts, GREEDY, use_tqdm=False), strict=True):
            check_greedy(checkpoint.hf, prompt, out.outputs[0].token_ids)
        check_nothing_kept(llm)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_demo_model_matches_without_exception(device: str, schedule: str) -> None:
    """A trained model's logits are not flat: no tie is an excuse."""
    if not DEMO.exists():
        pytest.fail("the demo model is part of the project")
    hf = Qwen2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    texts = ["def fibonacci(n):", "import os\n\n\ndef read_file(path):", "class Stack:\n", "x", "# The answer is"]
    with make_llm(DEMO, device, SCHEDULES[schedule]) as llm:
        params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
        for _ in range(2):  # cold, then cached
            run = generate(llm.llm_engine, texts, params)
            for seq in run:
                check_greedy(hf, seq.tokens[: seq.num_prompt_tokens], seq.output_tokens, exact=True)
            assert any(seq.num_preemptions for seq in run) == ("small pool" in schedule)
        check_nothing_kept(llm)
