"""`octo train --ranks 2`: ranks end with their launcher, and save when it is asked to end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.train.state import saved_steps
from tests.conftest import REPOSITORY, snapshot
from tests.prepared import stage, write_data

WAIT_S = 240
NUM_STEPS = 4000

pytestmark = pytest.mark.timeout(3 * WAIT_S)


@pytest.fixture
def recipe(runs: Path, tmp_path: Path) -> Path:
    """A stage too long to end by itself, saved every 10 steps."""
    write_data(tmp_path / "data")
    config = stage(tmp_path / "data", "run", steps=NUM_STEPS, save_every=10)
    rundir.write_json(tmp_path / "stage.json", to_dict(replace(config, log_every_steps=10)))
    return tmp_path / "stage.json"


@contextlib.contextmanager
def started(recipe: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`octo train RECIPE OPTIONS...`, running; stderr goes to a file beside the recipe."""
    with (recipe.parent / "stderr").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_octo", "train", str(recipe), *options],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=log,
            text=True,
            # a shell ignores it for what runs in its background, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a system call only
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(what: Callable[[], bool], recipe: Path) -> None:
    """Wait until `what` holds."""
    end = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end, (recipe.parent / "stderr").read_text()[-3000:]
        time.sleep(0.2)


def test_a_killed_launch_leaves_no_rank_and_goes_on_from_its_last_save_until_an_interrupt_ends_all_ranks(recipe):
    run = rundir.run_folder("run")
    with started(recipe, "--ranks", "2") as process:
        wait_for(lambda: bool(saved_steps(run)), recipe)
        assert rundir.in_use(run)
        process.kill()
        process.wait()
        wait_for(lambda: not rundir.in_use(run), recipe)
    step = saved_steps(run)[-1]

    with started(recipe, "--ranks", "2") as process:
        wait_for(lambda: saved_steps(run)[-1] > step, recipe)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
    log = (recipe.parent / "stderr").read_text()
    assert f"resumed after step {step:,}" in log
    assert "interrupted; run it again to continue" in log
    assert not rundir.in_use(run)
    assert not rundir.is_done(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_launch_that_is_asked_to_end_saves_and_ends_well(recipe, signum):
    run = rundir.run_folder("run")
    with started(recipe, "--ranks", "2") as process:
        wait_for(lambda: bool(saved_steps(run)), recipe)
        process.send_signal(signum)
        assert process.wait(WAIT_S) == 0
    log = (recipe.parent / "stderr").read_text()
    assert f"stopped after step {saved_steps(run)[-1]:,}, saved" in log
    assert "Traceback" not in log
    assert not rundir.in_use(run)
    assert not rundir.is_done(run)


def test_torchrun_is_refused_a_run_that_another_process_owns(recipe):
    run = rundir.run_folder("run")
    with rundir.lock(run):
        before, torchrun = snapshot(run), [sys.executable, "-m", "megatron_octo.launch.ranks", "--standalone"]
        done = subprocess.run(
            [*torchrun, "--nproc-per-node=2", "-m", "megatron_octo", "train", str(recipe)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert snapshot(run) == before
    assert done.returncode == 2, "a rank's own exit code"
    assert f"{run} is owned by process {os.getpid()}" in done.stderr
