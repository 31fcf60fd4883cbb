"""Options and fixtures that all tests share."""

import pytest
import torch

pytest.register_assert_rewrite("fake_engine", "engine_invariants")  # their checks say what they compared

# Most tests' tensors are small: two threads would meet at barriers more than they compute (the bench tests took 68 s
# with two and 13 s with one on a busy machine). Tests of thread counts set their own.
torch.set_num_threads(1)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every kernel's test runs where the kernel does: on the CPU, and on CUDA where there is one."""
    return request.param
