"""The GPU benchmark's script, tried where there is none: a tiny model, FP8 by emulation."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY

torch = pytest.importorskip("torch", reason="torch is not installed: make setup")

BENCHMARKS = REPOSITORY / "benchmarks"
STEPS = 4
TINY = ("--tiny", "--steps", str(STEPS), "--precision", "bf16,mxfp8")


def gpu_train(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_train.py", *args],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_train

    return gpu_train


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two cells were measured."""
    folder = tmp_path_factory.mktemp("gpu-train")
    done = gpu_train(*TINY, "--folder", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_cells_are_measured_by_octo_train_and_kept(measured):
    report = json.loads(gpu_train(*TINY, "--folder", str(measured), "--json").stdout)
    bf16, fp8 = report["cells"]
    assert [bf16, fp8] == [json.loads(line) for line in (measured / "results.jsonl").read_text().splitlines()]
    for cell in (bf16, fp8):
        assert (cell["status"], len(cell["losses"])) == ("measured", STEPS)
        assert cell["tokens_per_second_per_gpu"] > 0
        assert cell["peak_gib"] > 0
        assert cell["deterministic"]
    assert bf16["loss_gap"] == 0
    assert 0 < abs(fp8["loss_gap"]) < 0.01
    assert not any((measured / "runs").glob("*/checkpoints/step*"))  # killed, not asked to end: it would save


def test_the_plan_names_what_does_not_fit_and_what_is_missing(script, tmp_path):
    machine = script.Machine(
        platform=script.Platform(device="cpu", backend="gloo", layer_family="local"), gpu="", gib=79
    )
    asked = argparse.Namespace(precision=script.PRECISIONS, tiny=False, nondeterministic=False, steps=STEPS)
    cells = [cell for model in script.MODELS for cell in script.cells_of(model, tmp_path, machine, asked)]
    assert {cell.model.partition("-")[0]: cell.config.model.num_layers for cell in cells}["1b"] == 16
    assert all(cell.memory[0] <= 79 for cell in cells)
    assert all(("-layers" in cell.model) == (cell.model.partition("-")[0] != "1b") for cell in cells)
    assert all((cell.missing is None) == (cell.precision == "bf16") for cell in cells)


def test_a_cell_that_takes_too_long_is_given_up(script, tmp_path, runs):
    machine = script.Machine(
        platform=script.Platform(device="cpu", backend="gloo", layer_family="local"), gpu="", gib=79
    )
    asked = argparse.Namespace(precision=["bf16"], tiny=True, nondeterministic=True, steps=STEPS, cell_timeout_s=0.0)
    (cell,) = script.cells_of("tiny", tmp_path, machine, asked)
    assert not cell.config.compute.deterministic
    assert script.measure(cell, tmp_path, asked) == {"status": "not done in 0 s"}


def test_a_cell_that_runs_out_of_memory_is_a_row_and_not_the_end(script):
    log = "octo train: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (-v shows where)\n"
    assert script.failure(log, 1, 60) == "out of memory"
    assert script.failure("a\nocto train: RuntimeError: no\n", 1, 60) == "failed: octo train: RuntimeError: no"
    assert script.failure("step 1\n", -signal.SIGKILL, 60) == "not done in 60 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would be measured")
def test_without_a_gpu_it_says_so_and_a_dry_run_needs_none(tmp_path):
    refused = gpu_train("--folder", str(tmp_path / "none"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "needs a GPU" in refused.stderr
    plan = gpu_train("--dry-run", "--folder", str(tmp_path / "none"), "--models", "8b", "--precision", "bf16")
    assert plan.returncode == 0
    assert "8b-9-layers bf16" in plan.stdout
    assert not (tmp_path / "none").exists()
