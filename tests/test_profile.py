"""bench.py profile: what a trace says of a step, on traces made by hand and, with a GPU, on a true one."""

from pathlib import Path

import pytest
import torch

from nanoinfer.bench import plot_profile, profile
from nanoinfer.bench.target import open_target

LAYER = [("decode_kernel<bf16, 64>", 0, 4), ("rms_norm_kernel<8>", 3, 6), ("nvjet_sm90_tst", 7, 9)]


def make_trace(steps: int, length: float = 100.0) -> list[dict]:
    """Steps of a message and two layers, beside which the last tokens leave and the next message comes; a CPU event and
    a mark, which do not count."""
    events: list[dict] = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5}, {"name": "mark", "ts": 1}]
    for step in range(steps):
        origin = step * length
        for way, begin in (
            ("DtoD (Device -> Device)", 0),
            ("DtoH (Device -> Pinned)", 31),
            ("HtoD (Pinned -> Device)", 31),
        ):
            events.append({"cat": "gpu_memcpy", "name": f"Memcpy {way}", "ts": origin + begin, "dur": 2})
        for layer in range(2):
            events += [
                {
                    "cat": "kernel",
                    "name": f"void nanoinfer::cuda::{name}(A)",
                    "ts": origin + 10 + 20 * layer + a,
                    "dur": b - a,
                }
                for name, a, b in LAYER
            ]
    return events


def test_costs_and_idle_time_add_up_to_the_step() -> None:
    """A kernel that starts early costs what it runs on after the one before: overlaps are not counted twice."""
    found = profile.from_events(make_trace(4), batch=8, context=128, plain_us=90.0, steps=4)
    assert found.step_us == 100
    costs = found.costs()
    assert costs == {"idle": 82, "attention": 8, "norm": 4, "linear": 4, "other": 2}
    assert sum(costs.values()) == 100
    assert profile.table([found])[1][:4] == ["8", "128", "90", "100"]
    layer = ["decode", "rms_norm", "nvjet_sm90_tst"]
    assert [span.name for span in found.spans] == ["Memcpy", *layer, "decode", "Memcpy", "Memcpy", *layer[1:]]
    assert [span.name for span in plot_profile.middle_layer(found.spans)] == layer


def test_the_step_shown_is_a_typical_one() -> None:
    """Neither the slowest nor the fastest."""
    events = make_trace(2) + [event | {"ts": event["ts"] + 200} for event in make_trace(2, 300.0)]
    events += [event | {"ts": event["ts"] + 600} for event in make_trace(2)]
    assert profile.from_events(events, 1, 1, 90.0, 6).step_us == 100


def test_a_trace_of_other_steps_is_refused() -> None:
    with pytest.raises(SystemExit, match="the trace shows 4 steps, expected 5"):
        profile.from_events(make_trace(4), 1, 1, 90.0, 5)


@pytest.mark.parametrize(
    ("name", "short"),
    [("void nanoinfer::cuda::(anonymous namespace)::sample_pick_kernel<4>(X)", "sample_pick"),
     ("nvjet_sm90_tst_192x16", "nvjet_sm90_tst_192x16"), ("Memset (Unknown)", "Memset"),
     ("void cublasLt::splitKreduce_kernel<32, float>(int)", "splitKreduce")],
)  # fmt: skip
def test_names_are_the_functions_own(name: str, short: str) -> None:
    assert profile.short_name(name) == short


def test_a_timeline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profiles = [profile.from_events(make_trace(4), batch, 128, 90.0, 4) for batch in (1, 256)]
    plot_profile.plot_profile(str(tmp_path / "step.png"), "a card", profiles)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with open_target(None, None, "cpu", "auto") as target, pytest.raises(SystemExit, match="needs a CUDA device"):
        profile.measure(target, {}, 1, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_true_step_has_every_kind_of_kernel() -> None:
    with open_target(None, None, "cuda", "bfloat16") as target:
        found = profile.measure(target, {}, 20, 20)  # of fewer rows, queries and keys are rotated by their product
    assert found.plain_us > 0
    assert {"linear", "attention", "norm", "rotary and store", "sampling"} <= found.costs().keys()
