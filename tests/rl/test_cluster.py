"""The process that holds the Ray cluster: following it, and ending what it leaves."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_octo.errors import BadInput, OctoError
from megatron_octo.rl.cluster import (
    MARKER,
    Cluster,
    NotStarted,
    RunFailed,
    _clean,
    _clear_stale,
    _sweep,
    home,
    members,
    started,
    write_token,
)


@pytest.fixture(autouse=True)
def short_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's last lines need no wait."""
    monkeypatch.setattr("megatron_octo.rl.cluster.DRAIN_S", 0.2)


@contextlib.contextmanager
def engine(script: str) -> Iterator[Cluster]:
    """A cluster whose engine is `script`; `status(text)` answers in it."""
    status, theirs = os.pipe()
    prelude = f"import json, os, sys\ndef status(text): os.write({theirs}, json.dumps(text).encode() + b'\\n')\n"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", prelude + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(theirs,),
    )
    os.close(theirs)
    assert process.stdout is not None and process.stdin is not None
    out = Cluster(process, status)
    for fd in (process.stdout.fileno(), status):
        out.selector.register(fd, selectors.EVENT_READ)
    yield out
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.wait(10)
    process.stdout.close()
    os.close(status)


def test_runs_follow_each_other_in_one_engine() -> None:
    lines: list[str] = []
    with engine("for line in sys.stdin:\n print('got', json.loads(line)[0])\n status('finished')") as cluster:
        cluster.run(["first"], lines.append)
        cluster.run(["second"], lines.append)
    assert lines == ["got first", "got second"]


def test_a_failed_run_says_what_the_engine_said() -> None:
    script = "sys.stdin.readline()\nprint('why')\nstatus('ValueError: no')\nsys.stdin.readline()"
    with engine(script) as cluster, pytest.raises(RunFailed, match="ValueError: no"):
        cluster.run([], lambda line: None)


def test_an_engine_that_dies_is_a_failed_run_with_its_lines() -> None:
    lines: list[str] = []
    script = "sys.stdin.readline()\nprint('last words')\nos._exit(3)"
    with engine(script) as cluster, pytest.raises(RunFailed, match="ended with code 3"):
        cluster.run([], lines.append)
    assert lines == ["last words"]


def test_an_engine_that_is_dead_already_is_a_failed_run() -> None:
    with engine("os._exit(4)") as cluster:
        cluster.process.wait(10)
        with pytest.raises(RunFailed, match="ended with code 4"):
            cluster.run(["x"], lambda line: None)


def test_an_engine_is_ready_once_it_says_so() -> None:
    with engine("status('ready')\nsys.stdin.readline()") as cluster:
        cluster.wait_ready()


@pytest.mark.parametrize("end", ["os._exit(5)", "status('RuntimeError: no raylet')\nsys.stdin.readline()"])
def test_an_engine_whose_ray_fails_is_not_started_and_says_why(end: str) -> None:
    said = "ended with code 5" if "exit" in end else "RuntimeError: no raylet"
    with (
        engine(f"print('INFO all is well')\nprint('GcsError: out of memory')\n{end}") as cluster,
        pytest.raises(NotStarted, match=rf"(?s){said}\n    GcsError: out of memory"),
    ):
        cluster.wait_ready()


def test_a_cluster_that_an_engine_refuses_is_bad_input() -> None:
    with (
        engine("status({'what': 'it has GPUs', 'fix': 'go there'})\nsys.stdin.readline()") as cluster,
        pytest.raises(BadInput, match="it has GPUs\n  fix: go there"),
    ):
        cluster.wait_ready()


@contextlib.contextmanager
def failing(starts: list[str], times: int) -> Iterator[int]:
    """A Ray that does not start so many times; `starts` tells what happens."""
    starts.append("start")
    try:
        if len(starts) <= 2 * times:
            raise NotStarted("the raylet died")
        yield len(starts)
    finally:
        starts.append("end")


def test_ray_that_does_not_start_is_tried_again_and_what_it_left_is_ended_first(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_octo"), "propagate", True)
    starts: list[str] = []
    with started(lambda: failing(starts, 2), tries=3, fix="x") as entered:
        assert entered == len(starts) == 5
    assert starts == ["start", "end"] * 3
    said = dict.fromkeys(each.getMessage() for each in caplog.records)  # twice where the log has its own handler
    assert list(said) == [f"Ray did not start, and is tried again ({left} left): the raylet died" for left in (2, 1)]


def test_ray_that_never_starts_is_an_error_with_a_fix() -> None:
    starts: list[str] = []
    with pytest.raises(OctoError, match=r"the raylet died\n  fix: make room"):
        started(lambda: failing(starts, 9), tries=3, fix="make room").__enter__()
    assert starts == ["start", "end"] * 3


def test_what_fails_on_a_ray_that_runs_is_not_tried_again() -> None:
    starts: list[str] = []
    with (
        pytest.raises(RunFailed, match="a run's own"),
        started(lambda: failing(starts, 0), tries=3, fix="x"),
    ):
        raise RunFailed("a run's own")
    assert starts == ["start", "end"]


def test_a_token_is_new_and_its_owner_s_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_token(tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    assert len(one.read_text()) == 64 and one.read_text() != two.read_text()
    assert one.stat().st_mode & 0o777 == 0o600


def test_of_a_progress_bar_the_last_redraw_stays() -> None:
    assert _clean(b"\x1b[36mstep 1\rstep 2\r") == "step 2"
    assert _clean("caf\u00e9".encode() + b"\xff") == "caf\u00e9\ufffd"


def test_the_sweep_ends_this_cluster_s_processes_and_no_others() -> None:
    ours, other = (
        subprocess.Popen(["sleep", "60"], env={**os.environ, MARKER: name}) for name in ("test-ours", "test-other")
    )
    try:
        deadline = time.monotonic() + 10
        while members("test-ours") != [ours.pid] and time.monotonic() < deadline:
            time.sleep(0.05)
        _sweep("test-ours", patience_s=0)
        assert ours.wait(10) < 0
        assert other.poll() is None and members("test-other") == [other.pid]
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def test_what_dead_owners_left_ends_and_is_removed_and_what_living_ones_have_stays() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale, living = Path(f"/tmp/octo-ray-{dead.pid}-stale"), Path(f"/tmp/octo-ray-{os.getpid()}-living")
    for folder in (stale, living):
        folder.mkdir()
    # in a session of its own, as vLLM's engine is, which may outlive a task that is killed
    left, ours = (
        subprocess.Popen(["sleep", "60"], env={**os.environ, MARKER: name}, start_new_session=True)
        for name in ("stale", "living")
    )
    try:
        _clear_stale()
        assert not stale.exists() and living.exists()
        assert left.wait(10) == -signal.SIGKILL and ours.poll() is None
    finally:
        living.rmdir()
        for process in (left, ours):
            process.kill()
            process.wait()


def test_a_cluster_s_folder_says_whose_it_is_and_which() -> None:
    with home() as (folder, marks):
        assert folder.name == f"octo-ray-{os.getpid()}-{marks[MARKER]}" and folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_the_patches_wait_for_imports_and_their_targets_exist() -> None:
    from megatron_octo.platform.openrlhf_cpu.openrlhf_cpu_patches import AFTER, BEFORE
    from megatron_octo.rl.command import CPU_PATCHES

    code = "import json, sys; print(json.dumps([type(f).__name__ for f in sys.meta_path] + sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(CPU_PATCHES)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    loaded = json.loads(run.stdout)
    assert "_PatchingFinder" in loaded
    assert not {"torch", "vllm", "openrlhf", "ray"} & set(loaded)
    site = [Path(folder) for folder in sys.path]
    for package in ("openrlhf", "vllm"):
        if not any((folder / package).is_dir() for folder in site):
            pytest.skip(f"{package} is not installed")
    for name in (*BEFORE, *AFTER):
        path = Path(*name.split("."))
        assert any((each / path).with_suffix(".py").is_file() or (each / path).is_dir() for each in site), name
