"""The process that runs OpenRLHF, with a Ray and an OpenRLHF that only look like it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.errors import BadInput
from megatron_octo.rl.command import CPU_PATCHES, environment
from megatron_octo.rl.engine import join_ray

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
    asked = {"address": None, "folder": str(folder), "num_nodes": 1, "num_gpus": 1, "cuda": True, "status": theirs}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "megatron_octo.rl.engine",
            json.dumps({**asked, "parent": os.getpid()}),
        ],
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


class Joined:
    """What stands for the package ray."""

    override: str | None = None
    variables: Mapping[str, str] = {}
    nodes: Sequence[Mapping[str, float]] = ()
    """The resources of each node."""

    def init(self, *, address: str, runtime_env: dict[str, Any], logging_level: str) -> None:
        self.override, self.variables = os.environ.get("RAY_OVERRIDE_JOB_RUNTIME_ENV"), runtime_env["env_vars"]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Joined:
    """A Ray to join."""
    ray = Joined()
    there: Any = types.ModuleType("ray")
    there.init = ray.init
    there.nodes = lambda: [{"Alive": True, "Resources": resources} for resources in ray.nodes]
    monkeypatch.setitem(sys.modules, "ray", there)
    for name in (*environment({}, cuda=False), "RAY_OVERRIDE_JOB_RUNTIME_ENV"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return ray


@pytest.mark.parametrize(
    ("kinds", "cuda", "said"),
    [
        ((None, None), False, None),
        ((None, "H100"), True, None),
        ((None, "H100"), False, r"have GPUs \(H100\), and this machine shows none"),
    ],
)
def test_a_cluster_of_gpus_is_not_joined_from_a_machine_without_one(
    kinds: tuple[str | None, ...], cuda: bool, said: str | None, joined: Joined
) -> None:
    declared = {"CPU": 3.0, "GPU": 1.0}  # as our nodes without GPUs are
    joined.nodes = [declared | ({f"accelerator_type:{kind}": 1.0} if kind else {}) for kind in kinds]
    with pytest.raises(BadInput, match=said) if said else contextlib.nullcontext() as caught:
        join_ray("head:6379", num_nodes=2, num_gpus=1, cuda=cuda)
    if caught is not None:
        assert """--entrypoint-resources '{"accelerator_type:H100": 0.001}' -- env -u CUDA""" in caught.value.fix


def test_nodes_that_offer_no_device_do_not_count(joined: Joined) -> None:
    joined.nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 0.0, "accelerator_type:H100": 1.0}]
    join_ray("head:6379", num_nodes=1, num_gpus=1, cuda=False)


def test_ray_takes_our_variables_within_a_job_that_has_some_of_them_too(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment({"PYTHONPATH": "/the/job/s"}, cuda=False).items():
        monkeypatch.setenv(name, value)
    joined.nodes = [{"CPU": 3.0, "GPU": 1.0}]
    join_ray("head:6379", num_nodes=1, num_gpus=1, cuda=False)
    assert joined.override == "1"
    path = joined.variables["PYTHONPATH"].split(os.pathsep)
    assert path[0] == str(CPU_PATCHES) and path[-1] == "/the/job/s"
    source = PathFinder.find_spec("ray")
    if source is None or source.origin is None:
        pytest.skip("ray is not installed")
    worker = (Path(source.origin).parent / "_private/worker.py").read_text()
    assert 'override=os.getenv("RAY_OVERRIDE_JOB_RUNTIME_ENV") == "1"' in worker
