"""The engine on a GPU: tokens depend neither on graphs nor on launching ahead nor on the run; decoding never waits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanoinfer import LLM, LLMEngine, SamplingParams
from nanoinfer.engine.cuda_graph import CudaRunner, StepGraphs
from nanoinfer.engine.step_shapes import bucket_ladder
from nanoinfer.outputs import RequestOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"
MODES: dict[str, dict[str, object]] = {
    "graphs, a step ahead": {},
    "eager, a step ahead": {"enforce_eager": True},
    "graphs, in lockstep": {"async_scheduling": False},
    "eager, in lockstep": {"enforce_eager": True, "async_scheduling": False},
}


def make_llm(**options: object) -> LLM:
    return LLM(DEMO, dtype="bfloat16", kv_cache_memory_bytes=2**26, max_num_batched_tokens=512, **options)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


def run_without_waiting(engine: LLMEngine, steps: int) -> None:
    """Any call that waits for the device, but for the event that brings tokens, raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def workload(llm: LLM) -> list[list[int]]:
    """Tokens of requests that differ in everything: prompt, length, greedy or sampled, filters, penalties."""
    prompts = [[(7 * i + j) % 1000 + 5 for j in range(3 + 11 * (i % 9))] for i in range(24)]
    params = [
        SamplingParams(
            temperature=(0, 0.7, 1.0)[i % 3], top_k=(0, 20)[i % 2], top_p=(1.0, 0.9)[i // 2 % 2], seed=i,
            repetition_penalty=(1.0, 1.2)[i % 5 == 0], presence_penalty=(0, -0.3, 0.5, 0)[i % 4],
            frequency_penalty=(0.2, 0, 0)[i // 3 % 3], max_tokens=4 + 5 * (i % 6), ignore_eos=True,
        )
        for i in range(24)
    ]  # fmt: skip
    llm.llm_engine.reset_prefix_cache()  # a cached prefix is a shorter chunk, which may be computed in another order
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


def test_tokens_do_not_depend_on_graphs_or_launching_ahead() -> None:
    """In bf16, where every change of a kernel or a shape shows. Steps with prompts are captured in the second round."""
    tokens = {}
    for name, options in MODES.items():
        with make_llm(**options) as llm:
            tokens[name] = [workload(llm) for _ in range(3)]
            num_captured = len(llm.llm_engine.runner.chunk_graphs)
            assert num_captured > 1 if name.startswith("graphs") else num_captured == 0
    for name in MODES:
        assert tokens[name] == [tokens["eager, in lockstep"][0]] * 3, name


@pytest.mark.parametrize("repeats", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_repeats_are_equal(llm: LLM, repeats: int) -> None:
    """The same mixed workload again and again: a race, or memory that is read before it is written, would show."""
    first = workload(llm)
    for _ in range(repeats):
        assert workload(llm) == first


@pytest.mark.parametrize("name", ["send_stream", "copy_stream"])
def test_streams_beside_are_waited_for(llm: LLM, monkeypatch, name: str) -> None:
    """A message that comes late, and tokens that are fetched late, when the next step is through: all as before."""
    first, step, stream = workload(llm), llm.llm_engine.step, getattr(llm.llm_engine.runner, name)

    def late() -> list[RequestOutput]:
        with stream:
            torch.cuda._sleep(2 * 10**6)  # clocks: 1 ms, in which a step runs several times
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", late)
    assert workload(llm) == first


def test_blocks_come_in_as_many_messages_as_they_need(monkeypatch) -> None:
    """Few requests' messages have room for 20 new blocks, many's for 80; four prompts of one step need 52."""
    prompts = [[(7 * i + j) % 1000 + 5 for j in range(50)] for i in range(4)]
    params, tokens, ahead = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True), [], []
    for max_num_seqs in (4, 64):
        options = {"dtype": "float32", "max_num_seqs": max_num_seqs, "max_model_len": 64, "block_size": 4}
        with LLM(DEMO, kv_cache_memory_bytes=2**26, **options) as llm:
            table, kinds = llm.llm_engine.runner.table, list[bool]()
            messages = table.messages

            def counted(step, into, messages=messages, kinds=kinds) -> Iterator[tuple[int, bool]]:
                for size, last in messages(step, into):
                    kinds.append(last)
                    yield size, last

            monkeypatch.setattr(table, "messages", counted)
            tokens.append([out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)])
            ahead.append(kinds.count(False))
    assert ahead == [2, 0]
    assert tokens[0] == tokens[1]


def push_away(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[prompt + output] -= 2
    return logits


def everything(llm: LLM) -> list[RequestOutput]:
    """Requests that all ask for something else, and one that asks for nothing, each in 7 forms."""
    asked = [
        {"logprobs": 5}, {"logprobs": 0}, {"logprobs": 20, "frequency_penalty": 0.5}, {"logit_bias": {7: 3.0, 9: -50}},
        {"allowed_token_ids": list(range(40, 900)), "logprobs": 2}, {"bad_words": ["self", " return x"]},
        {"min_tokens": 3, "stop_token_ids": [10, 11, 12]}, {"prompt_logprobs": 3}, {"logits_processors": [push_away]},
        {"logprobs": 3, "logit_bias": {5: 4.0}, "repetition_penalty": 1.3}, {},
    ]  # fmt: skip
    params = [
        SamplingParams(
            **{"temperature": (0, 0.7, 1.0)[i % 3], "top_k": (0, 20)[i % 2], "seed": i, "max_tokens": 4 + 3 * (i % 7),
               "ignore_eos": True} | asked[i % len(asked)]
        )
        for i in range(7 * len(asked))
    ]  # fmt: skip
    prompts = [[(7 * i + j) % 1000 + 5 for j in range(3 + 5 * (i % 9))] for i in range(len(params))]
    llm.llm_engine.reset_prefix_cache()
    return llm.generate(prompts, params, use_tqdm=False)


def test_what_is_asked_for_does_not_depend_on_graphs() -> None:
    """Tokens, log probabilities and ranks are the same to the bit, in a batch of requests that all differ."""
    told = {}
    for name in ("graphs, a step ahead", "eager, a step ahead"):
        with make_llm(**MODES[name]) as llm:
            told[name] = [
                [(out.prompt_logprobs, out["token_ids"], out.outputs[0].logprobs) for out in everything(llm)]
                for _ in range(3)  # the second time, steps with prompts are captured as well
            ]
    assert told["graphs, a step ahead"] == [told["eager, a step ahead"][0]] * 3


class CountedGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graph, self.count = graph, 0

    def replay(self) -> None:
        self.count += 1
        self.graph.replay()


def test_steps_of_special_requests_are_replayed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of decodes alone, whatever its requests ask for."""
    runner = llm.llm_engine.runner
    graphs = {
        bucket: StepGraphs(CountedGraph(each.forward), each.logits, CountedGraph(each.sample))
        for bucket, each in runner.graphs.items()
    }
    shapes, run = [], runner._run

    def recorded(shape, special) -> None:
        shapes.append((shape, special is not None))
        run(shape, special)

    monkeypatch.setattr(runner, "graphs", graphs)
    monkeypatch.setattr(runner, "_run", recorded)
    everything(llm)
    decodes = [special for shape, special in shapes if shape.num_tokens == shape.num_samples]
    for part in ("forward", "sample"):
        assert sum(getattr(each, part).count for each in graphs.values()) == len(decodes)
    assert sum(decodes) > 10


def test_telling_and_rules_do_not_wait() -> None:
    """What is asked for goes up and comes back beside the steps: no call between launches waits for the device."""
    options = [
        {"logprobs": 5}, {"logprobs": 2, "presence_penalty": 0.5}, {"logit_bias": {7: 3.0}}, {"min_tokens": 30},
        {"allowed_token_ids": [5, 6, 7], "logprobs": 0}, {"bad_words": ["x"]}, {},
    ]  # fmt: skip
    with make_llm() as llm:
        engine = llm.llm_engine
        for _ in range(2):  # the first round loads kernels and pins memory
            for i, own in enumerate(options):
                engine.add_request([7 + i, 9, 11], SamplingParams(max_tokens=40, ignore_eos=True, seed=i, **own))
            for _ in range(8):
                engine.step()
            run_without_waiting(engine, steps=20)
            while engine.has_unfinished_requests():
                assert not [out.error for out in engine.step() if out.error]


def test_decoding_neither_waits_nor_allocates(llm: LLM) -> None:
    """Between launches the host reads one event; a step of graphs takes no memory."""
    engine = llm.llm_engine
    for _ in range(2):  # the first round loads the sampler's kernels
        for i in range(5):
            engine.add_request([7 + i, 9, 11], SamplingParams(max_tokens=40, ignore_eos=True))
        for _ in range(8):
            engine.step()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        run_without_waiting(engine, steps=20)
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        while engine.has_unfinished_requests():
            engine.step()
    assert allocated == 0


def test_graphs_serve_every_size(llm: LLM) -> None:
    """Up to max_num_seqs requests a step is captured, before the first one comes."""
    runner = llm.llm_engine.runner
    assert isinstance(runner, CudaRunner)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for count in (1, 2, 3, 9, 17, 256):
        outs = llm.generate([[5, 6, 7]] * count, params, use_tqdm=False)
        assert len({tuple(out["token_ids"]) for out in outs}) == 1
    assert runner.graphs.keys() == set(bucket_ladder(256))


SHARED = [(3 * j) % 700 + 5 for j in range(512)]  # whole blocks, so that prompts can share them


@pytest.mark.parametrize("beside, prefix", [(False, []), (True, []), (True, SHARED)], ids=["alone", "beside", "cached"])
def test_prompts_are_replayed_from_the_second_on(
    monkeypatch: pytest.MonkeyPatch, beside: bool, prefix: list[int]
) -> None:
    """Alone, beside a decode, behind a cached beginning: the model is launched for the first one, and to capture it.

    Nothing of a replay waits for the device, whatever the prompts' lengths within the shape.
    """
    with make_llm(max_num_seqs=8) as llm:
        engine, calls, launched = llm.llm_engine, [], []
        llm.generate([[*prefix, 1]], SamplingParams(max_tokens=1), use_tqdm=False)
        if beside:
            engine.add_request([5, 6, 7], SamplingParams(max_tokens=400, ignore_eos=True, temperature=0))
            engine.step()
        forward = engine.runner.model.forward
        monkeypatch.setattr(engine.runner.model, "forward", lambda *args: calls.append(1) or forward(*args))
        for i in range(8):
            calls.clear()
            tokens = [(i + 7 * j) % 900 for j in range(129 + 7 * i)]
            engine.add_request([*prefix, *tokens], SamplingParams(max_tokens=2, ignore_eos=True, temperature=0))
            if i < 3:  # capturing takes memory
                engine.step()
            else:
                run_without_waiting(engine, steps=1)
            for _ in range(2):
                engine.step()
            launched.append(len(calls))
        assert launched == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_step_that_cannot_be_captured_is_launched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What there is no memory for is no reason to fail a request; nor is it tried again, or kept from being seen."""
    with make_llm() as llm:
        model = llm.llm_engine.runner.model
        forward = model.forward

        def greedy(*args: object) -> torch.Tensor:
            if torch.cuda.is_current_stream_capturing():
                torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return forward(*args)

        monkeypatch.setattr(model, "forward", greedy)
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        tokens = [llm.generate([[5] * 50], params, use_tqdm=False)[0]["token_ids"] for _ in range(4)]
        assert tokens == [tokens[0]] * 4 and len(tokens[0]) == 5
        assert [record.levelname for record in caplog.records if "captured" in record.message].count("WARNING") == 1


def test_a_step_that_runs_out_of_memory_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests end with the reason; the engine, its device sound, serves the next one."""
    runner = llm.llm_engine.runner
    monkeypatch.setattr(runner, "chunk_graphs", {})
    forward = type(runner.model).forward

    def greedy(*args: object) -> torch.Tensor:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(type(runner.model), "forward", greedy)
        (out,) = llm.generate([[5] * 9], SamplingParams(max_tokens=3), use_tqdm=False)
    assert out.outputs[0].finish_reason == "error" and "out of memory" in str(out.error)
    for _ in range(3):
        (out,) = llm.generate([[5] * 9], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        assert out.outputs[0].finish_reason == "length"


def test_engines_come_and_go() -> None:
    """A closed engine gives its memory back: the next one, with the default share of it, has room."""
    for _ in range(3):
        with LLM(DEMO, dtype="bfloat16", gpu_memory_utilization=0.8) as llm:
            assert llm.generate(["def f("], use_tqdm=False)[0].outputs[0].token_ids
