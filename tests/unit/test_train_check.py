"""What `train` refuses before it imports torch, and what a rerun may change."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.train import (
    FromImport,
    FromRun,
    MarksConfig,
    MidTrainConfig,
    ParallelConfig,
    ValidateConfig,
    WatchConfig,
)
from megatron_octo.errors import BadInput
from megatron_octo.train.run import check, finished
from megatron_octo.train.state import TrainState, latest_save, saved_steps
from tests.conftest import REPOSITORY, snapshot
from tests.prepared import MODEL, stage, write_data


@pytest.fixture
def config(runs: Path, tmp_path: Path) -> MidTrainConfig:
    """A stage whose data are prepared."""
    write_data(tmp_path / "data")
    return stage(tmp_path / "data", "run")


def _save(run: str, step: int, config: MidTrainConfig, *, done: bool = True) -> Path:
    folder = rundir.step_folder(rundir.run_folder(run), step)
    folder.mkdir(parents=True)
    rundir.write_json(folder / "config.json", to_dict(config))
    rundir.write_json(folder / "model.json", to_dict(config.model))
    TrainState(step=step).write(folder)
    if done:
        rundir.mark_done(folder)
    return folder


def test_good_inputs_pass_and_nothing_is_written(config, tmp_path):
    before = snapshot(tmp_path)
    assert check(config, 2).plan.data_ranks == 2
    assert snapshot(tmp_path) == before


def test_a_layout_that_does_not_fit_the_ranks(config):
    with pytest.raises(BadInput, match=r"3 ranks do not hold whole copies"):
        check(replace(config, parallel=ParallelConfig(tensor=2)), 3)


def test_a_missing_import(config, tmp_path):
    with pytest.raises(BadInput, match=r"base does not exist\n.*octo convert from-hf"):
        check(replace(config, start=FromImport(path=tmp_path / "base")), 1)


def test_an_import_of_another_model(config, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    rundir.write_json(base / "model.json", to_dict(replace(MODEL, num_layers=2)))
    rundir.mark_done(base)
    with pytest.raises(BadInput, match=r"model.num_layers: 2 there, 4 asked for"):
        check(replace(config, start=FromImport(path=base)), 1)


def test_a_missing_parent(config):
    with pytest.raises(BadInput, match=r"parent run .*stable does not exist"):
        check(replace(config, start=FromRun(run="stable")), 1)


def test_an_unfinished_parent_is_refused_unless_its_save_is_named(config):
    save = _save("stable", 5, config)
    with pytest.raises(BadInput, match=r"has not finished\n.*start.step"):
        check(replace(config, start=FromRun(run="stable")), 1)
    assert check(replace(config, start=FromRun(run="stable", step=5)), 1).start_folder == save


def test_a_parents_save_that_is_not_there(config):
    _save("stable", 5, config)
    with pytest.raises(BadInput, match=r"no save at step 6"):
        check(replace(config, start=FromRun(run="stable", step=6)), 1)


def test_moments_of_another_kind_of_optimizer(config):
    _save("stable", 5, replace(config, parallel=ParallelConfig(distributed_optimizer=False)))
    start = FromRun(run="stable", step=5)
    with pytest.raises(BadInput, match=r"distributed_optimizer False, this run has True"):
        check(replace(config, start=start), 1)
    check(replace(config, start=replace(start, optimizer=False)), 1)


def test_a_torn_save_is_never_selected(config):
    run = rundir.run_folder("run")
    _save("run", 5, config)
    _save("run", 10, config, done=False)
    (run / "checkpoints" / ".step_00000015.1.tmp").mkdir()
    rundir.mark_done(run / "checkpoints" / ".step_00000015.1.tmp")
    assert saved_steps(run) == [5]
    assert latest_save(run) == rundir.step_folder(run, 5)


def test_a_run_that_resumes_needs_its_parent_no_more(config):
    save = _save("run", 5, config)
    parent = lineage.Lineage(name="stable", kind="train", weights_sha256="1")
    lineage.write(save, lineage.Lineage(name="run", kind="train", weights_sha256="2", parent=parent))
    inputs = check(replace(config, start=FromRun(run="stable")), 1)
    assert inputs.start_folder is None
    assert inputs.parent == parent


def test_a_rerun_may_change_the_layout_the_saves_and_the_log(config):
    rundir.write_json(rundir.run_folder("run") / "config.json", to_dict(config))
    changed = replace(
        config,
        parallel=ParallelConfig(tensor=2, sequence=True, pipeline=2, virtual_pipeline=2),
        budget=replace(config.budget, micro_batch_sequences=1),
        save=replace(config.save, every_steps=1, keep_last=5),
        log_every_steps=1,
    )
    assert not finished(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, seed=99),
        lambda c: replace(c, parallel=ParallelConfig(distributed_optimizer=False)),
        lambda c: replace(c, budget=replace(c.budget, train_tokens=2 * c.budget.train_tokens)),
    ],
)
def test_a_rerun_may_change_nothing_else(config, change):
    rundir.write_json(rundir.run_folder("run") / "config.json", to_dict(config))
    with pytest.raises(BadInput, match="other settings"):
        finished(change(config))


def test_the_checks_and_a_done_run_need_no_torch(config, tmp_path):
    rundir.write_json(tmp_path / "config.json", to_dict(config))
    rundir.mark_done(rundir.run_folder("run"))
    script = (
        "import sys, pathlib\n"
        "from megatron_octo.config.base import read_settings\n"
        "from megatron_octo.config.train import MidTrainConfig\n"
        "from megatron_octo.train.run import check, train\n"
        f"config = read_settings(MidTrainConfig, pathlib.Path({str(tmp_path / 'config.json')!r}))\n"
        "check(config, 1); train(config)\n"
        "sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, env=os.environ, timeout=60, check=False)
    assert done.returncode == 0


def test_validation_of_sources_that_hold_nothing_out(config):
    with pytest.raises(BadInput, match=r"no source in data\.sources holds out"):
        check(replace(config, validate=ValidateConfig(every_steps=5)), 1)


def test_wandb_that_is_not_installed(config, monkeypatch):
    monkeypatch.setattr("megatron_octo.train.run.find_spec", lambda name: None)
    check(config, 1)
    with pytest.raises(BadInput, match=r"the wandb package is not installed\n.*megatron_octo\[wandb\]"):
        check(replace(config, wandb_project="project"), 1)


def test_a_rerun_may_change_how_it_is_watched(config):
    rundir.write_json(rundir.run_folder("run") / "config.json", to_dict(config))
    changed = replace(
        config,
        watch=WatchConfig(on_loss_spike="skip"),
        validate=ValidateConfig(sequences=7),
        marks=MarksConfig(every_tokens=1),
        wandb_project="project",
    )
    assert not finished(changed)
