"""tests/sanitize.py without a GPU: its cases are right on the CPU, every op has some, and what is wrong is seen."""

import pytest
import torch
from kernel_cases import GROUPS, Case, cases_of
from sanitize import check
from torch import Tensor

from nanoinfer import ops

MOST = 3_000_000  # numbers of a case that is run here; the others, of attention, take seconds


def size(case: Case) -> int:
    return sum(value.numel() for value in case.arguments.values() if isinstance(value, Tensor))


@pytest.mark.parametrize("group", GROUPS)
def test_cases_are_right(group: str) -> None:
    """Kernels for the CPU, or plain torch, agree with the definition; every case can be made."""
    right = [check(case, "cpu") for case in cases_of(group) if size(case) < MOST]
    assert right and all(right)


def test_every_op_has_a_case() -> None:
    assert {case.op for group in GROUPS for case in cases_of(group)} == set(ops.SCHEMAS)


WRONG = {"numbers": lambda out: out * 1.1, "NaN": lambda out: out * torch.nan, "shape": lambda out: out[:, :-1]}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    case = next(case for case in cases_of("small") if case.op == "silu_and_mul")
    right = ops.silu_and_mul
    monkeypatch.setattr(ops, "silu_and_mul", lambda x: WRONG[wrong](right(x)))
    assert not check(case, "cpu")


def test_a_wrong_integer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no tolerance: here a token that the op writes into its argument."""
    case = next(case for case in cases_of("sampling") if case.op == "sample")
    right = ops.sample

    def wrong(**arguments: Tensor) -> None:
        right(**arguments)
        arguments["tokens"][-1] += 1

    assert check(case, "cpu")
    monkeypatch.setattr(ops, "sample", wrong)
    assert not check(case, "cpu")
