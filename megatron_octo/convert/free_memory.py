"""Memory that this process may still take: the host's, and that of its control groups (a job, a container)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
"""A line `number:controllers:path` for each hierarchy; that of version 2 names no controllers."""
ROOT = Path("/sys/fs/cgroup")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files of the limit and of what is used, and the line of memory.stat with cached files in it, which make room."""


def available_bytes() -> int:
    """Memory that is free, by the kernel's estimate."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (ROOT / "memory", VERSION_1) if controllers else (ROOT, VERSION_2)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit holds for all groups below it
            if folder.is_relative_to(root) and (folder / names[0]).exists():
                yield from _left(folder, *names)


def _left(group: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    """What a group may still take, nothing where it has no limit."""
    most = (group / limit).read_text().strip()
    if most != "max":
        sizes = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield max(0, int(most) - int((group / used).read_text()) + int(sizes[cached]))
