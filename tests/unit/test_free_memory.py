"""Free memory, as the control groups of a job or a container leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_octo.convert import free_memory

FREE = 10_000
VERSIONS = {
    "v1": ("7:cpu,memory:{}", "memory", free_memory.VERSION_1, "9223372036854771712"),
    "v2": ("0::{}", ".", free_memory.VERSION_2, "max"),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("groups", "left"),
    [
        ({"job": None, "job/step": None}, FREE),
        ({"job": (8000, 3000, 0), "job/step": None}, 5000),
        ({"job": (8000, 3000, 1000), "job/step": (9000, 2000, 0)}, 6000),
        ({"job": (20_000, 1000, 0), "job/step": (3000, 2500, 100)}, 600),
        ({"job": (20_000, 1000, 0), "job/step": None}, FREE),
        ({"job": (2000, 2500, 0), "job/step": None}, 0),
        ({"": (2000, 500, 0)}, 1500),
        ({}, FREE),
    ],
)
def test_the_smallest_of_the_hosts_and_the_groups_rests_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, groups: dict[str, Any], left: int
) -> None:
    line, folder, (limit, used, cached), unlimited = VERSIONS[version]
    (tmp_path / "cgroup").write_text(f"5:cpuset:/elsewhere\n{line.format('/job/step')}\n")
    for group, sizes in groups.items():  # a container sees the groups below its own only
        place = tmp_path / folder / group
        place.mkdir(parents=True, exist_ok=True)
        most, taken, files = sizes or (unlimited, 5, 0)
        (place / limit).write_text(f"{most}\n")
        (place / used).write_text(f"{taken}\n")
        (place / "memory.stat").write_text(f"anon 1\n{cached} {files}\n")
    monkeypatch.setattr(free_memory, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(free_memory, "ROOT", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": FREE}))
    assert free_memory.available_bytes() == left
