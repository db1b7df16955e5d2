"""The process that runs OpenRLHF, with a Ray and an OpenRLHF that only look like it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RAY = """
import atexit, os, signal, sys, time

cluster_resources = available_resources = dict

def init(**_):
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    if os.environ["WHERE"] == "start":
        os.kill(os.getpid(), signal.SIGTERM)

def get():
    try:
        print("running", flush=True)
        time.sleep(60)
    except SystemExit:
        raise SystemExit(1) from None

@atexit.register
def shutdown():
    os.kill(os.getpid(), signal.SIGTERM)  # another one
    print("Ray has ended", flush=True)
"""
"""Its handler of SIGTERM and what becomes of a SystemExit within `get` are Ray's."""
OPENRLHF = """
import os, sys

if __name__ == "__main__":
    if os.environ["WHERE"] == "refusal":
        sys.exit(2)
    import ray
    ray.get()
"""


@contextlib.contextmanager
def engine(folder: Path, where: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """An engine that meets something `where`, and the file descriptor of its answers; a run is asked of it."""
    (folder / "ray/util").mkdir(parents=True)
    (folder / "ray/__init__.py").write_text(RAY)
    (folder / "ray/util/placement_group.py").write_text("placement_group_table = dict")
    (folder / "openrlhf/cli").mkdir(parents=True)
    for package in ("openrlhf", "openrlhf/cli"):
        (folder / package / "__init__.py").touch()
    (folder / "openrlhf/cli/train_ppo_ray.py").write_text(OPENRLHF)
    status, theirs = os.pipe()
    asked = {"address": None, "folder": str(folder), "num_nodes": 1, "num_gpus": 1, "cuda": True}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_octo.rl.engine", json.dumps({**asked, "status": theirs, "parent": os.getpid()})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), *sys.path)), "WHERE": where},
        pass_fds=(theirs,),
        text=True,
    )
    os.close(theirs)
    assert process.stdin is not None
    process.stdin.write("[]\n")
    process.stdin.flush()
    try:
        yield process, status
    finally:
        process.kill()
        process.communicate()
        os.close(status)


def answers(status: int) -> list[str]:
    """Of an engine that has ended."""
    return [json.loads(line) for line in os.read(status, 65_536).splitlines()]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["start", "run"])
def test_sigterm_ends_an_engine_by_ray_s_own_ending(where: str, tmp_path: Path) -> None:
    with engine(tmp_path, where) as (process, status):
        assert process.stdout is not None
        if where == "run":
            assert "running\n" in iter(process.stdout.readline, "")
            process.send_signal(signal.SIGTERM)
        process.wait(30)  # though its input is open
        said = process.stdout.read()
        assert process.returncode == 0 and said.endswith("Ray has ended\n")
        assert answers(status) == (["SystemExit: 15"] if where == "start" else ["ready"])
        assert where == "start" or "Traceback" not in said


def test_openrlhf_s_own_exit_is_an_answer(tmp_path: Path) -> None:
    with engine(tmp_path, "refusal") as (process, status):
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "SystemExit: 2" in said
        assert answers(status) == ["ready", "SystemExit: 2"]
