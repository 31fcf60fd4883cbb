"""How much host memory there is."""

import os
from pathlib import Path

UNLIMITED = 2**63


def available_host_memory() -> int:
    """Bytes that can be taken without swapping, as the kernel estimates it and the control group allows."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return min(free, _control_group_rest())


def _control_group_rest(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes left under a container's limit (cgroup v2, as seen from inside; limits of outer groups are not)."""
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return UNLIMITED
    # `used` counts the page cache, a checkpoint just read for one, which gives way to whoever needs the memory.
    return UNLIMITED if limit == "max" else int(limit) - used + int(statistics.get("inactive_file", 0))
