"""The scheduler's rules, one by one. `fake_engine.py` checks in every one of these steps what is read and written."""

import logging

import pytest
from fake_engine import VOCAB, FakeEngine

from nanoinfer import SamplingParams
from nanoinfer.engine.sequence import Status
from nanoinfer.errors import EngineDead, InvalidRequest


@pytest.fixture(autouse=True)
def _silence_failing_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "nanoinfer")


def prompt(length: int, first: int = 0) -> list[int]:
    """`length` tokens; prompts with a different first one have no block in common."""
    return [(first + i) % VOCAB for i in range(length)]


def test_requests_start_in_order_of_arrival() -> None:
    """A short request does not overtake: with room for one, each starts when the one before it ends."""
    engine = FakeEngine(max_num_seqs=1)
    for length in (9, 1, 5):
        engine.add(prompt(length, first=length), max_tokens=1)
    engine.drain()
    assert engine.history == [[("0", 0, 9)], [("1", 0, 1)], [("2", 0, 5)]]


def test_decodes_come_first_and_prompts_fill_the_budget() -> None:
    """Nobody who is generating waits for somebody's long prompt; what the budget leaves goes to the prompt."""
    engine = FakeEngine(budget=6)
    engine.add(prompt(4), max_tokens=4)
    engine.add(prompt(10, first=5), max_tokens=1)
    engine.drain()
    assert engine.history == [
        [("0", 0, 4), ("1", 0, 2)],
        [("0", 4, 5), ("1", 2, 7)],
        [("0", 5, 6), ("1", 7, 10)],
        [("0", 6, 7)],
    ]


def test_requests_of_one_step_share_their_prefix() -> None:
    """The second of two equal prompts of 11 tokens computes the 3 that do not fill a block, in the same step."""
    engine = FakeEngine(block_size=4)
    first, second = (engine.add(prompt(11), max_tokens=1) for _ in range(2))
    engine.drain()
    assert engine.history == [[("0", 0, 11), ("1", 8, 11)]]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)


def test_a_fully_cached_prompt_recomputes_one_token_and_stores_nothing() -> None:
    """Its logits are needed, its K and V are there: the slot is -1, since a shared block is never written."""
    engine = FakeEngine(block_size=4)
    engine.add(prompt(8), max_tokens=1)
    engine.drain()
    engine.add(prompt(8), max_tokens=3)
    engine.step()
    assert engine.history[-1] == [("1", 7, 8)]
    assert engine.runner.buffers["slots"][0] == -1
    engine.drain()


def test_generated_tokens_are_found_by_a_longer_prompt() -> None:
    """The next turn of a conversation holds the last one's answer: its full blocks are in the cache as well."""
    engine = FakeEngine(block_size=4)
    turn = engine.add(prompt(5), max_tokens=8)
    engine.drain()  # 12 of the 13 tokens have been computed: three blocks
    following = engine.add([*turn.tokens, 1], max_tokens=1)
    engine.drain()
    assert following.num_cached_tokens == 12


def test_the_latest_arrival_gives_way_and_is_next_in_line() -> None:
    """When the pool is full the earliest goes on; who gave way comes before everybody who has never run."""
    engine = FakeEngine(num_blocks=5, block_size=2, caching=False)
    first, second, third = (engine.add(prompt(3, first=3 * i), max_tokens=5) for i in range(3))
    engine.step()
    assert engine.scheduler.running == [first, second] and engine.scheduler.waiting == [third]
    while not second.num_preemptions:
        engine.step()
    assert engine.scheduler.running == [first] and engine.scheduler.waiting == [second, third]
    assert not second.block_table and second.row < 0
    engine.drain()
    assert first.num_preemptions == 0


def test_a_preempted_request_still_receives_its_token_in_flight() -> None:
    """It waits for it before it is scheduled again: the host would otherwise not know what to recompute."""
    engine = FakeEngine(num_blocks=5, block_size=2, caching=False, steps_ahead=1)
    _, second = (engine.add(prompt(3, first=3 * i), max_tokens=5) for i in range(2))
    while not second.num_preemptions:
        known = len(second.tokens)
        engine.step()
    assert second.status is Status.WAITING
    assert len(second.tokens) == known + 1
    engine.drain()


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_surplus_token_is_dropped(steps_ahead: int) -> None:
    """An end by token is known one step late: what that step computed is neither output nor published."""
    engine = FakeEngine(block_size=1, steps_ahead=steps_ahead)
    known = engine.add(prompt(3), max_tokens=4)
    engine.drain()
    seq = engine.add(prompt(3), max_tokens=9, stop=[known.output_tokens[1]])
    engine.drain()
    assert seq.output_tokens == known.output_tokens[:2] and seq.finish_reason == "stop"
    surplus = ("1", 4, 5)  # computes on from the token that ended it
    assert (engine.history[-1] == [surplus]) == bool(steps_ahead)


def test_an_end_by_length_is_known_before_launch() -> None:
    """No step is wasted on it, one step ahead or not."""
    histories = []
    for steps_ahead in (0, 1):
        engine = FakeEngine(steps_ahead=steps_ahead)
        engine.add(prompt(3), max_tokens=3)
        engine.drain()
        histories.append(engine.history)
    assert histories[0] == histories[1] == [[("0", 0, 3)], [("0", 3, 4)], [("0", 4, 5)]]


def test_a_row_is_reused_only_after_its_last_commit() -> None:
    """A launched step still reads and advances the row of a request that was aborted meanwhile."""
    engine = FakeEngine(max_num_seqs=1, steps_ahead=1)
    first, second = (engine.add(prompt(3), max_tokens=9) for _ in range(2))
    engine.step()
    row = first.row
    engine.abort_request("0")
    assert first.row == row and row not in engine.scheduler.free_rows
    engine.step()  # launches the second, then commits the first's last step
    assert second.row != row and first.row < 0 and row in engine.scheduler.free_rows
    engine.drain()


def test_the_end_of_the_pool_is_an_end_by_length() -> None:
    """Alone in a pool of 8 tokens, a request that asks for more gets 8; one that cannot start at all is refused."""
    engine = FakeEngine(num_blocks=4, block_size=2)
    seq = engine.add(prompt(3), max_tokens=100)
    engine.drain()
    assert len(seq.tokens) == 8 and seq.finish_reason == "length"
    with pytest.raises(InvalidRequest, match="prompt of 8 tokens"):
        engine.add_request(prompt(8), SamplingParams())
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("fault", ["before", "after", "tokens"])
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_failed_step_withdraws_what_it_published(fault: str, steps_ahead: int) -> None:
    """Prompt blocks are published when they are scheduled; if the step fails their contents are anything."""
    engine = FakeEngine(block_size=4, steps_ahead=steps_ahead)
    first = engine.add(prompt(9), max_tokens=4)
    engine.runner.fault = fault
    engine.drain()
    assert first.finish_reason == "error" and "injected" in str(first.error)
    second = engine.add(prompt(9), max_tokens=4)
    engine.drain()
    assert second.num_cached_tokens == 0 and second.finish_reason == "length"


def test_a_step_behind_a_failed_one_starts_over() -> None:
    """It may have read what the failed one did not write; its other requests lose a step, not their answer."""
    engine = FakeEngine(block_size=4, steps_ahead=1)
    first = engine.add(prompt(9), max_tokens=4)
    engine.runner.fault = "tokens"
    engine.step()
    second = engine.add(prompt(9), max_tokens=4)  # finds the blocks of the step that is lost
    engine.step()
    assert engine.history[1] == [("0", 9, 10), ("1", 8, 9)]
    assert first.finish_reason == "error" and second.status is Status.WAITING
    engine.drain()
    assert engine.history[2] == [("1", 0, 9)]
    assert second.finish_reason == "length"


def test_a_failed_launch_leaves_the_step_before_alone() -> None:
    """What was complete when it failed is delivered."""
    engine = FakeEngine(steps_ahead=1)
    first = engine.add(prompt(3), max_tokens=1)
    engine.step()
    second = engine.add(prompt(3, first=5), max_tokens=1)
    engine.runner.fault = "after"
    engine.step()
    assert (first.finish_reason, second.finish_reason) == ("length", "error")
    engine.drain()


def test_logits_that_are_not_finite_fail_one_request() -> None:
    """Its neighbours go on, and its blocks, which may hold the cause, are not found by later prompts."""
    engine = FakeEngine(block_size=4)
    bad = engine.add(prompt(9), max_tokens=8, nan=2)
    good = engine.add(prompt(9, first=3), max_tokens=8)
    engine.drain()
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert len(bad.output_tokens) == 1 and "not finite" in str(bad.error)
    later = engine.add(prompt(9), max_tokens=1)
    engine.drain()
    assert later.num_cached_tokens == 0


def test_a_poisoned_prefix_is_not_found_after_preemption() -> None:
    """The token that tells of it may come when the request has lost its blocks, which are still in the cache."""
    engine = FakeEngine(num_blocks=5, block_size=2, steps_ahead=1)
    engine.add(prompt(3), max_tokens=5)
    bad = engine.add(prompt(4, first=5), max_tokens=5, nan=2)
    while not bad.num_preemptions:
        engine.step()
    assert bad.finish_reason == "error", "its last token was to be in flight"
    later = engine.add(prompt(4, first=5), max_tokens=1)
    engine.drain()
    assert later.num_cached_tokens == 0


def test_a_lost_device_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device runs nothing any more, serving on would fail request after request: it is said once."""

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    engine = FakeEngine()
    engine.add(prompt(3), max_tokens=5)
    engine.runner.fault = "before"
    monkeypatch.setattr(engine.runner, "check_device", lost)
    for _ in range(2):
        with pytest.raises(EngineDead, match=r"the device is lost: .*illegal memory access"):
            engine.step()
    with pytest.raises(EngineDead, match="the device is lost"):
        engine.add_request([1, 2])


def test_abort_in_every_state() -> None:
    """Waiting, mid-prompt, running, in flight, preempted, finished, twice, unknown: blocks and rows come back."""
    engine = FakeEngine(num_blocks=5, block_size=2, budget=4, caching=False, steps_ahead=1)
    first, second, third = (engine.add(prompt(3, first=3 * i), max_tokens=5) for i in range(3))
    engine.abort_request("2")
    assert third.finish_reason == "abort"
    engine.step()
    assert second.in_flight and second.num_scheduled == 1  # mid-prompt
    while not second.num_preemptions:
        engine.step()
    engine.abort_request(["1", "1", "nobody"])
    engine.step()
    assert first.in_flight
    engine.abort_request(["0", "2"])
    assert engine.drain() == []
