"""How much host memory there is."""

import os
from pathlib import Path


def available_host_memory() -> int:
    """Bytes that can be taken without swapping, as the kernel estimates it and the control group allows."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return min(free, _control_group_rest())


def _control_group_rest() -> int:
    """Bytes left under a container's limit (cgroup v2)."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text(), (root / "memory.current").read_text()
    except OSError:
        return 2**63
    return 2**63 if limit.strip() == "max" else int(limit) - int(used)
