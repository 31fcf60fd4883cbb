"""Qwen2 against Hugging Face's, at every position: head layouts, windows, RoPE types, prefill and decode, ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Cache, save_checkpoint
from torch import Tensor

from nanoinfer.config import ModelConfig
from nanoinfer.utils.loader import load_model
from nanoinfer.utils.parallel import TP

LENGTH = 24
CASES: dict[str, dict[str, Any]] = {
    "0.5b": {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 1},
    "7b": {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128},
    "windows": {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "all_windows": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                 "original_max_position_embeddings": 16}},
}  # fmt: skip


def both(path: Path, case: str) -> tuple[Any, Any, ModelConfig]:
    """Hugging Face's model and ours, from one folder."""
    theirs = save_checkpoint(path, **CASES[case])
    config = ModelConfig.from_dir(path)
    ours = load_model(path, config, device=torch.device("cpu"), dtype=torch.float32, max_length=LENGTH)
    return theirs, ours, config


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(theirs: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = theirs(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, case: str) -> None:
    """Two prompts prefilled together and decoded one token at a time give Hugging Face's logits everywhere.

    One prompt is cut into two chunks, so that a step holds chunks with and without tokens before them.
    """
    theirs, ours, config = both(tmp_path, case)
    cache = Cache(config, rows=2, length=LENGTH)
    a, b = prompt(LENGTH, 0), prompt(LENGTH - 5, 1)
    got: dict[int, list[Tensor]] = {0: [], 1: []}
    steps = [[(0, 0, a[:7])], [(1, 0, b[:14]), (0, 7, a[7:19])]]
    steps += [[(0, 19 + i, a[19 + i : 20 + i]), (1, 14 + i, b[14 + i : 15 + i])] for i in range(5)]
    for chunks in steps:
        for (row, _, _), logits in zip(chunks, cache.logits(ours, chunks), strict=True):
            got[row].append(logits)
    for row, ids in enumerate((a, b)):
        want = expected(theirs, ids)
        assert want.std() > 0.1  # logits that differ from each other, or agreement would say nothing
        torch.testing.assert_close(torch.cat(got[row]), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_windows_matter(tmp_path: Path) -> None:
    """The window case would fail with full attention: its logits differ from those of the same weights without."""
    theirs, ours, config = both(tmp_path, "windows")
    assert config.windows == (0, 0, 5, 5)
    for layer in ours.model.layers:
        layer.self_attn.window = 0
    ids = prompt(LENGTH, 0)
    full = Cache(config, 1, LENGTH).logits(ours, [(0, 0, ids)])[0]
    difference = (full - expected(theirs, ids)).abs().amax(dim=1)
    assert difference[:5].max() < 1e-4
    assert difference[5:].min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """In half precision logits are no further from Hugging Face's float32 than twice its own error at that type."""
    theirs, _, config = both(tmp_path, "0.5b")
    ours = load_model(tmp_path, config, device=torch.device("cpu"), dtype=dtype, max_length=LENGTH)
    ids = prompt(LENGTH, 0)
    exact = expected(theirs, ids)
    got = Cache(config, 1, LENGTH, dtype=dtype).logits(ours, [(0, 0, ids)])[0]
    theirs_low = expected(theirs.to(dtype), ids).float()
    assert got.dtype == torch.float32
    assert (got - exact).abs().mean() <= 2 * (theirs_low - exact).abs().mean()


@dataclass(frozen=True)
class ThreadTP(TP):
    """A rank that is a thread of this process."""

    barrier: threading.Barrier | None = None
    parts: tuple[list[Tensor], ...] = ()

    def all_reduce(self, x: Tensor) -> Tensor:
        assert self.barrier is not None
        own = self.parts[self.rank]
        own.append(x.clone())
        call = len(own) - 1  # not simply the last: the other rank may already be at its next call
        self.barrier.wait(timeout=30)
        return x.copy_(sum(part[call] for part in self.parts))


@pytest.mark.parametrize("case", ["0.5b", "7b"])
def test_two_ranks(tmp_path: Path, case: str) -> None:
    """Two ranks, each with half the heads, columns and cache of the same folder, agree with Hugging Face."""
    theirs = save_checkpoint(tmp_path, **CASES[case])
    config = ModelConfig.from_dir(tmp_path)
    ids, barrier, parts = prompt(LENGTH, 0), threading.Barrier(2), ([], [])
    half = replace(config, num_kv_heads=config.num_kv_heads // 2)  # the heads that a rank's cache has

    def run(rank: int) -> Tensor:
        tp = ThreadTP(rank, 2, barrier=barrier, parts=parts)
        ours = load_model(tmp_path, config, device=torch.device("cpu"), dtype=torch.float32, max_length=LENGTH, tp=tp)
        return Cache(half, 1, LENGTH).logits(ours, [(0, 0, ids)])[0]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    want = expected(theirs, ids)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert len(parts[0]) == 2 * config.num_layers
