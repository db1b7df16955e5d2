"""Marks: which steps they are, and the processes beside the training."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.evaluate import EvaluateConfig, ScoredModel
from megatron_octo.config.train import MarksConfig, MidTrainConfig
from megatron_octo.errors import SettingsError
from megatron_octo.platform.process import child_environment
from megatron_octo.train import marks as module
from megatron_octo.train.marks import marks
from tests.prepared import BATCH, SEQ_LENGTH, stage

STEP_TOKENS = BATCH * SEQ_LENGTH
# Stands for `octo`: waits for the file `go` beside it, notes its arguments and some of its environment, and fails if
# they say so.
CHILD = """
import os, sys, time, pathlib
folder = pathlib.Path(sys.argv[1])
while not (folder / "go").exists():
    time.sleep(0.05)
with (folder / "called").open("a") as file:
    file.write(" ".join([*sys.argv[2:], os.environ.get("RANK", "no rank"), os.environ["CUDA_VISIBLE_DEVICES"]]) + "\\n")
if sys.argv[2] == "convert":
    pathlib.Path(sys.argv[-1]).mkdir(parents=True)
    (pathlib.Path(sys.argv[-1]) / "DONE").touch()
sys.exit(3 if sys.argv[2] == "evaluate" else 0)
"""


@pytest.fixture
def config(tmp_path: Path) -> MidTrainConfig:
    """A stage with a mark at its step 3."""
    return replace(stage(tmp_path, "run"), marks=MarksConfig(at_tokens=(3 * STEP_TOKENS,), devices="7"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder with saves after steps 2 and 3, as a rank of a group sees it; `octo` is CHILD."""
    monkeypatch.setattr(module, "octo_command", lambda *args: [sys.executable, "-c", CHILD, str(tmp_path), *args])
    monkeypatch.setenv("RANK", "0")
    for step in (2, 3):
        rundir.mark_done(rundir.step_folder(tmp_path / "run", step))
    return tmp_path / "run"


@pytest.fixture
def called(tmp_path: Path) -> Callable[[], list[str]]:
    """What was started, a line a command."""
    return lambda: (tmp_path / "called").read_text().splitlines() if (tmp_path / "called").exists() else []


@pytest.mark.parametrize(
    ("at", "every", "steps"),
    [
        ((3 * STEP_TOKENS, 1), None, [1, 3]),
        ((), 2 * STEP_TOKENS, [2, 4]),
        ((STEP_TOKENS + 1,), None, [2]),
        ((), None, []),
    ],
)
def test_a_mark_is_reached_by_the_step_that_reads_so_many_tokens(at, every, steps):
    config = MarksConfig(at_tokens=at, every_tokens=every)
    reached = [step for step in range(1, 6) if config.reached((step - 1) * STEP_TOKENS, step * STEP_TOKENS)]
    assert reached == steps


def test_marks_that_mean_nothing_are_refused():
    with pytest.raises(SettingsError, match="0 tokens is no mark"):
        MarksConfig(every_tokens=0)
    models = (ScoredModel(model=Path("m"), output=Path("o")),)
    with pytest.raises(SettingsError, match=r"marks\.evaluate\.models"):
        MarksConfig(evaluate=EvaluateConfig(task="t", problems=Path("p"), models=models))


def test_the_training_goes_on_meanwhile_and_the_save_stays_until_then(config, run, called, tmp_path):
    with marks(run, config) as ours:
        ours.start()
        assert ours.in_use == {3}
        assert called() == []
        (tmp_path / "go").touch()
    assert ours.in_use == set()
    save, export = rundir.step_folder(run, 3), run / "hf" / "step_00000003"
    assert called() == [f"convert to-hf {save} {export} no rank 7"]


def test_what_is_done_or_was_tried_is_not_started_again(config, run, called, tmp_path):
    (tmp_path / "go").touch()
    for _ in range(2):
        with marks(run, config) as ours:
            ours.start()
            ours.start()
    assert len(called()) == 1


def test_a_failure_is_a_warning_and_a_later_attempt_tries_that_part_again(config, run, called, tmp_path, caplog):
    evaluate = EvaluateConfig(task="sums", problems=tmp_path / "problems.jsonl", models=())
    (tmp_path / "go").touch()
    for _ in range(2):
        with marks(run, replace(config, marks=replace(config.marks, evaluate=evaluate))) as ours:
            ours.start()
    settings = run / "scores" / "step_00000003" / "sums.json"
    assert [line.split()[0] for line in called()] == ["convert", "evaluate", "evaluate"]
    assert called()[1] == f"evaluate {settings} no rank 7"
    assert rundir.read_json(settings)["models"] == [
        {"model": str(run / "hf" / "step_00000003"), "output": str(settings.with_suffix(""))}
    ]
    assert "ended with exit code 3" in caplog.text


def test_a_mark_that_cannot_start_is_a_warning_too(config, run, caplog):
    (run / "log").touch()  # a file where the logs' folder should be
    with marks(run, config) as ours:
        ours.start()
    assert ours.in_use == set()
    assert "step 3: its mark failed" in caplog.text


def test_an_error_of_the_training_does_not_wait(config, run):
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), marks(run, config) as ours:
        ours.start()
        raise ZeroDivisionError
    (working,) = set(threading.enumerate()) - before  # CHILD waits, and would end with this process
    (run.parent / "go").touch()
    ours.end()
    working.join()  # or it meets the next test's patches


def test_a_childs_environment_can_leave_out_what_is_ours(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert "RANK" not in child_environment({"A": "1"}, ("RANK",))
    assert child_environment({"A": "1"}, ("RANK",))["A"] == "1"


def test_a_run_that_was_asked_to_stop_does_not_wait_and_a_resume_starts_its_mark_again(config, run, called, tmp_path):
    with marks(run, config) as ours:
        ours.start()
        ours.leave()  # CHILD would wait for ever
    assert called() == []
    (tmp_path / "go").touch()
    with marks(run, config) as ours:
        ours.start()
    assert len(called()) == 1
