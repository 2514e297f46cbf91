"""How much host memory a process may still allocate."""

import os
from collections.abc import Iterator
from pathlib import Path

# Of control groups, version 2 and version 1: how the process's line in /proc/self/cgroup is marked, the folder of the
# hierarchy, the files of limit and usage, and the page cache in memory.stat, which the kernel gives back.
HIERARCHIES = (
    ("0::", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (":memory:", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(root: Path = Path("/")) -> int:
    """Host memory that can be allocated without swapping.

    The smallest of what the machine has available and what the limits of the process's control groups (containers,
    SLURM jobs) leave.

    Args:
        root: Folder that holds `proc` and `sys`.
    """
    return max(0, min([_machine(root), *_control_groups(root)]))


def _machine(root: Path) -> int:
    meminfo = root / "proc" / "meminfo"
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # not Linux: what is in use is unknown


def _control_groups(root: Path) -> Iterator[int]:
    """Yield the memory that the limits of the process's cgroup and of each parent leave."""
    file = root / "proc" / "self" / "cgroup"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for mark, folder, limit, usage, page_cache in HIERARCHIES:
        for path in (line.partition(mark)[2] for line in lines if mark in line):
            top = root / folder
            cgroup = top / path.lstrip("/")
            for group in (cgroup, *cgroup.parents):
                text = (group / limit).read_text(encoding="ascii").strip() if (group / limit).is_file() else "max"
                if text != "max":
                    statistics = (group / "memory.stat").read_text(encoding="ascii").splitlines()
                    reclaimable = int(dict(line.split() for line in statistics)[page_cache])
                    yield int(text) - int((group / usage).read_text(encoding="ascii")) + reclaimable
                if group == top:
                    break
