"""Scheduler, BlockManager, RequestTable and StepLoop under every order of events that hypothesis comes up with.

After every step the invariants of `engine_invariants.py` hold, every slot that attention reads holds the right
prefix, and in the end each request has the tokens that its prompt alone calls for (`fake_engine.py`), whatever the
pool, budget, block size, caching, steps ahead, neighbours, aborts and failures.

NANOINFER_STATEFUL_EXAMPLES asks for so many runs, other ones each time: 40,000 ran clean, in 26 minutes of one core.
"""

import logging
import os

import pytest
from fake_engine import VOCAB, FakeEngine, tell_truth
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from nanoinfer import SamplingParams
from nanoinfer.engine.sequence import Status
from nanoinfer.errors import InvalidRequest

# Prompts start as one of these do, so that they share blocks; the first is what the model itself goes on to say after
# one token, so that prompts also find what others have generated.
STREAMS = [tell_truth([1], 0, 80, (), 0).stream, [token * token % VOCAB for token in range(80)]]
EXAMPLES = 600  # 20 s; every bug of mutants.txt shows in the first 350
tokens = st.integers(0, VOCAB - 1)
STEPS = st.sampled_from([0, 0, 1, 1, 2, 5])  # time that passes after an event


class Engine(RuleBasedStateMachine):
    @initialize(
        spare_blocks=st.one_of(st.integers(0, 3), st.integers(0, 30)),  # beyond those of one longest request
        block_size=st.sampled_from([1, 1, 2, 4, 16]),
        max_num_seqs=st.sampled_from([1, 2, 3, 4, 6, 8]),
        budget=st.one_of(st.integers(1, 16), st.integers(1, 64)),
        caching=st.sampled_from([True, True, True, False]),
        steps_ahead=st.sampled_from([0, 1, 1]),
        max_model_len=st.one_of(st.integers(2, 8), st.integers(8, 64)),
        rows=st.sampled_from([None] * 6 + [1, 2, 3]),
    )
    def start(
        self, spare_blocks: int, block_size: int, max_num_seqs: int, budget: int, caching: bool, steps_ahead: int,
        max_model_len: int, rows: int | None,
    ) -> None:  # fmt: skip
        num_blocks = min(max(-(-max_model_len // block_size) + spare_blocks, 2), 40)
        self.engine = FakeEngine(
            num_blocks, block_size, max_num_seqs=max_num_seqs, budget=budget, caching=caching, steps_ahead=steps_ahead,
            max_model_len=min(max_model_len, num_blocks * block_size), rows=rows,
        )  # fmt: skip
        self.reported: list[str] = []
        self.aborted: set[str] = set()

    @rule(
        stream=st.sampled_from(range(len(STREAMS))),
        length=st.one_of(st.integers(0, 8), st.integers(0, 40)),
        aligned=st.booleans(),
        tail=st.lists(tokens, max_size=2),
        max_tokens=st.one_of(st.integers(1, 4), st.integers(1, 60)),
        stop=st.sampled_from([[], [], [], [], [4], [7], [6, 7, 8, 9, 10]]),
        ignore_eos=st.sampled_from([True, True, True, False]),
        salt=st.sampled_from([0, 0, 0, 1]),
        nan=st.sampled_from([0] * 16 + [1, 2, 5]),
        copies=st.sampled_from([1, 1, 1, 2, 3, 8]),
        fit=st.sampled_from([True] * 7 + [False]),
        steps=STEPS,
    )
    def add(
        self, stream: int, length: int, aligned: bool, tail: list[int], max_tokens: int, stop: list[int],
        ignore_eos: bool, salt: int, nan: int, copies: int, fit: bool, steps: int,
    ) -> None:  # fmt: skip
        """What cannot be served is refused, alone, and changes nothing; all else is queued."""
        over = length % self.engine.cache.block_size if aligned else 0
        prompt = STREAMS[stream][: length - over] + tail
        if fit:
            prompt = (prompt or [0])[: self.engine.limits.max_model_len - 1]
        if 0 < len(prompt) < self.engine.limits.max_model_len:
            for _ in range(copies):
                self.engine.add(prompt, max_tokens, stop=stop, ignore_eos=ignore_eos, salt=salt, nan=nan)
            self.step(steps)
        else:
            with pytest.raises(InvalidRequest):
                self.engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))

    @rule(pick=st.integers(0, 9), times=st.integers(1, 2), steps=STEPS)
    def abort(self, pick: int, times: int, steps: int) -> None:
        """In any state: waiting, mid-prompt, running, in flight, preempted, finished, aborted before, unknown."""
        done = [seq.request_id for seq in self.engine.all if seq.status is Status.FINISHED]
        candidates = [*list(self.engine.replies)[:8], *done[-2:], "unknown"]
        request_id = candidates[pick % len(candidates)]
        self.aborted |= {request_id} & self.engine.replies.keys()
        self.engine.abort_request([request_id] * times)
        self.step(steps)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(steps=STEPS)
    def preempt(self, steps: int) -> None:
        """As when blocks run out: it is always the latest arrival."""
        self.engine.scheduler._preempt(self.engine.scheduler.running[-1])
        self.step(steps)

    @rule(steps=STEPS)
    def reset_prefix_cache(self, steps: int) -> None:
        used = any(self.engine.blocks.ref_counts)
        assert self.engine.reset_prefix_cache() == (not used)
        self.step(steps)

    @precondition(lambda self: self.engine.sequences)
    @rule(fault=st.sampled_from(["before", "after", "tokens", "tokens"]), steps=st.integers(1, 2))
    def fail(self, fault: str, steps: int) -> None:
        """The next step fails, before or after it reached the device, or when its tokens are read."""
        self.engine.runner.fault = fault
        self.step(steps)

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.reported += [output.request_id for output in self.engine.step()]

    def teardown(self) -> None:
        if hasattr(self, "engine") and self.engine.sound:
            self.reported += [output.request_id for output in self.engine.drain()]
            assert self.engine.reset_prefix_cache() and not self.engine.blocks.entries
            everybody = {seq.request_id for seq in self.engine.all}
            assert sorted(self.reported) == sorted(everybody - self.aborted), "each request is reported once"


def run(machine: type[Engine], examples: int, *, random: bool = False, shrink: bool = True) -> None:
    logger = logging.getLogger("nanoinfer")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # failing steps are part of the test
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples, stateful_step_count=40, deadline=None, derandomize=not random, database=None,
                # The phase that explains a failure line by line takes longer than all others together.
                phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
    finally:
        logger.setLevel(level)


@pytest.mark.timeout(0)  # shrinking a failure takes its time
def test_every_order_of_events() -> None:
    """The same runs every time, unless a number is asked for: then new ones."""
    examples = os.environ.get("NANOINFER_STATEFUL_EXAMPLES")
    run(Engine, int(examples or EXAMPLES), random=examples is not None)
