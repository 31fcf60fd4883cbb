"""AsyncLLMEngine: many callers at once, cancellation, errors, the end. On the demo model."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from nanoinfer import LLM, AsyncLLMEngine, EngineDead, InvalidRequest, RequestOutputKind, SamplingParams
from nanoinfer.outputs import RequestOutput

DEMO = Path(__file__).parent.parent / "nanoinfer" / "assets" / "demo"
PROMPTS = ["def fibonacci(n):\n", "class Stack:\n    def push(self, item):\n", "import os\n", "x = ["]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
OPTIONS = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8}


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLMEngine]:
    with AsyncLLMEngine(DEMO, **OPTIONS) as engine:
        yield engine


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def collect(engine: AsyncLLMEngine, prompt: object, params: SamplingParams, **options) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


async def idle(engine: AsyncLLMEngine) -> None:
    """Until nothing runs; the fixture's time limit ends a wait for ever."""
    while engine.engine.has_unfinished_requests() or engine.streams:
        await asyncio.sleep(0.01)


def test_callers_at_once_get_what_each_would_get_alone(engine: AsyncLLMEngine) -> None:
    """All of the text so far, growing, or its deltas, or all of it at the end; the last one is finished."""
    kinds = [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY]

    async def all_at_once() -> list[list[RequestOutput]]:
        asked = [replace(GREEDY, output_kind=kinds[i // 4]) for i in range(12)]
        return await asyncio.gather(*(collect(engine, PROMPTS[i % 4], params) for i, params in enumerate(asked)))

    with LLM(DEMO, **OPTIONS) as llm:
        alone = [out["text"] for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    for i, outputs in enumerate(run(all_at_once())):
        texts = [output["text"] for output in outputs]
        assert ("".join(texts) if i // 4 == 1 else texts[-1]) == alone[i % 4]
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert len(outputs) == 1 if i >= 8 else len(outputs) > 5
        if i < 4:
            assert all(later.startswith(text) for text, later in pairwise(texts))


def test_an_aborted_request_ends_for_whoever_reads_it(engine: AsyncLLMEngine) -> None:
    """With what there is of it, also where nothing else makes the engine go on; its neighbour is unharmed."""

    async def abort(name: str, neighbours: int) -> list[RequestOutput]:
        others = [asyncio.create_task(collect(engine, PROMPTS[1], GREEDY)) for _ in range(neighbours)]
        outputs = []
        async for output in engine.generate(PROMPTS[0], LONG, name):
            outputs.append(output)
            if len(outputs) == 3:
                await engine.abort(["unknown", name])
        for other in await asyncio.gather(*others):
            assert other[-1].outputs[0].finish_reason == "length"
        return outputs

    for neighbours in (0, 2):
        outputs = run(abort(f"beside {neighbours}", neighbours))
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert 3 <= len(outputs[-1].outputs[0].token_ids) < LONG.max_tokens / 2
        assert outputs[-1]["text"].startswith(outputs[2]["text"])
    run(idle(engine))


def test_a_cancelled_caller_ends_its_request_alone(engine: AsyncLLMEngine) -> None:
    """Its blocks come back while its neighbour goes on."""

    async def cancel_one() -> list[RequestOutput]:
        task = asyncio.create_task(collect(engine, PROMPTS[0], LONG))
        other = asyncio.create_task(collect(engine, PROMPTS[1], GREEDY))
        while not engine.streams or engine.streams[0].reply is None:
            await asyncio.sleep(0)
        cancelled = engine.streams[0].reply.seqs[0]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outputs = await other
        await idle(engine)
        assert cancelled.finish_reason == "abort", "it ran on to its end, unread"
        return outputs

    assert run(cancel_one())[-1].finished
    assert engine.engine.blocks.num_free == engine.engine.blocks.num_blocks


def test_leaving_the_loop_ends_the_request(engine: AsyncLLMEngine) -> None:
    async def leave() -> None:
        generator = engine.generate(PROMPTS[0], LONG)
        async for _ in generator:
            break
        (seq,) = engine.streams[0].reply.seqs
        await generator.aclose()
        await idle(engine)
        assert seq.finish_reason == "abort", "it ran on to its end, unread"

    run(leave())


def test_errors_reach_their_caller_alone(engine: AsyncLLMEngine) -> None:
    """A bad prompt before anything runs; an id in use; others are served."""

    async def bad_ones() -> None:
        with pytest.raises(InvalidRequest, match="prompt is empty"):
            await collect(engine, [], GREEDY)
        first = asyncio.create_task(collect(engine, PROMPTS[0], LONG, request_id="mine"))
        while "mine" not in engine.engine.replies:
            await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="'mine' belongs to an unfinished request"):
            await collect(engine, PROMPTS[1], GREEDY, request_id="mine")
        assert (await collect(engine, PROMPTS[1], GREEDY))[-1].finished
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await idle(engine)

    run(bad_ones())


def test_a_dead_engine_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever: those who wait get the error, and so do those who come later."""
    with AsyncLLMEngine(DEMO, **OPTIONS) as engine:

        def lost() -> None:
            raise EngineDead("the device is lost")

        async def die() -> None:
            tasks = [asyncio.create_task(collect(engine, prompt, LONG)) for prompt in PROMPTS]
            while len(engine.streams) < len(tasks):
                await asyncio.sleep(0)
            monkeypatch.setattr(engine.engine.loop, "step", lost)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineDead)
            with pytest.raises(EngineDead, match="the device is lost"):
                await collect(engine, PROMPTS[0], GREEDY)

        run(die())


def test_closing_ends_those_who_wait() -> None:
    engine = AsyncLLMEngine(DEMO, **OPTIONS)

    async def close_meanwhile() -> None:
        task = asyncio.create_task(collect(engine, PROMPTS[0], LONG))
        while not engine.streams:
            await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDead, match="closed"):
            await task

    run(close_meanwhile())
    engine.close()
    assert not engine.thread.is_alive()
