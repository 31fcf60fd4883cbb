"""What the machine is and can do at best, and how much memory was taken."""

import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

# Beyond any cache, and long enough that starting and waiting, 20 us on a GPU, do not count.
READ_BYTES = {"cpu": 2**30, "cuda": 2**33}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Limits:
    """The best that plain torch gets out of this machine."""

    read_gb_per_s: float
    tflop_per_s: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The shortest time to read so many bytes and do so much arithmetic (the roofline model, Williams, 2009)."""
        return max(num_bytes / self.read_gb_per_s / 1e9, flops / self.tflop_per_s / 1e12)

    def best(self, other: "Limits") -> "Limits":
        return Limits(max(self.read_gb_per_s, other.read_gb_per_s), max(self.tflop_per_s, other.tflop_per_s))


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Since the process began; another process's, such as a worker of vLLM's or SGLang's, is not seen."""

    rss_bytes: int
    cuda_bytes: int | None  # by torch's allocator; None without CUDA


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds that a call takes, its work on the device included."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def measure_limits(device: str, dtype: torch.dtype, repeats: int = 10) -> Limits:
    """Memory bandwidth by reading or copying READ_BYTES, arithmetic by a large matrix product; the best of some."""
    return Limits(_read_gb_per_s(device, repeats), _tflop_per_s(device, dtype, repeats))


def _read_gb_per_s(device: str, repeats: int) -> float:
    size = READ_BYTES[device]
    data = torch.ones(size // 4, device=device)
    half = data.numel() // 2
    # Adding up reads alone. On a GPU copying moves more bytes a second (an H200: 4.2 TB/s against 3.9): the adding was
    # the limit. A CPU also copies faster than it reads, by instructions that only write; no help to a reader.
    calls: list[Callable[[], object]] = [data.sum]
    if device == "cuda":
        calls.append(partial(data[:half].copy_, data[half:]))
    return size / min(timed(call, device) for call in calls for _ in range(repeats)) / 1e9


def _tflop_per_s(device: str, dtype: torch.dtype, repeats: int) -> float:
    size = MATMUL_SIZE[device]
    matrix = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(timed(partial(torch.mm, matrix, matrix), device) for _ in range(repeats)) / 1e12


def peak_memory(device: str) -> PeakMemory:
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return PeakMemory(rss, torch.cuda.max_memory_allocated() if device == "cuda" else None)
