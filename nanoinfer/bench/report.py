"""How results are shown: one line for the machine, a table, one JSON object."""

import platform
from collections.abc import Sequence

import torch

from nanoinfer.bench.machine import Limits, cpu_name

MIB = 2**20


def hardware(device: str) -> str:
    """The device and the software in one line."""
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB; {software}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads; {software}"


def describe(limits: Limits, dtype: str) -> str:
    return f"reads memory at {limits.read_gb_per_s:,.1f} GB/s, multiplies {dtype} at {limits.tflop_per_s:,.2f} TFLOP/s"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first row as header; the first column to the left, numbers to the right."""
    columns = max(map(len, rows))
    filled = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in filled) for i in range(columns)]
    lines = ["  ".join(cell.rjust(width) if i else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in filled]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def memory(rss_bytes: int, cuda_bytes: int | None) -> list[str]:
    """The last columns of a table: peak RSS and peak GPU memory."""
    return [f"{rss_bytes / MIB:,.0f} MiB", f"{cuda_bytes / MIB:,.0f} MiB" if cuda_bytes else "-"]


MEMORY_HEADER = ["peak RSS", "peak GPU"]
