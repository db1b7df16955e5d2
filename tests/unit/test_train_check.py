"""What `train` refuses before it imports torch, and what a rerun may change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo import checksums, lineage, rundir
from megatron_octo.budget.ledger import Block, LedgerRecord, Phase, Stream
from megatron_octo.config.base import to_dict
from megatron_octo.config.data import SourceConfig
from megatron_octo.config.schedule import ConstantRate, CosineRate, LinearRate
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
from megatron_octo.train.start import data_phases, shared_data
from megatron_octo.train.state import TrainState, latest_save, saved_steps
from tests.conftest import REPOSITORY, flip_bit, snapshot
from tests.prepared import MODEL, SEQ_LENGTH, stage, write_data, write_source


@pytest.fixture
def config(runs: Path, tmp_path: Path) -> MidTrainConfig:
    """A stage whose data are prepared."""
    write_data(tmp_path / "data")
    return stage(tmp_path / "data", "run")


def _save(run: str, step: int, config: MidTrainConfig, *, done: bool = True, **record: Any) -> Path:
    folder = rundir.step_folder(rundir.run_folder(run), step)
    folder.mkdir(parents=True)
    rundir.write_json(folder / "config.json", to_dict(config))
    rundir.write_json(folder / "model.json", to_dict(config.model))
    TrainState(step=step, tokens=step * config.batch_tokens).write(folder)
    ledger = LedgerRecord(
        planned_tokens=config.budget.train_tokens,
        consumed_tokens=step * config.batch_tokens,
        sources=(),
        phases=(Phase(sources=config.data.sources),),
        streams=record.get("streams", ()),
    )
    rundir.write_json(folder / "ledger.json", to_dict(ledger))
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


def test_a_run_does_not_go_on_over_data_that_were_prepared_anew(config, tmp_path):
    save = _save("run", 5, config)
    lineage.write(rundir.run_folder("run"), lineage.Lineage(name="run", kind="train", weights_sha256="2"))
    TrainState(step=5, data=check(config, 1).mixture.identities).write(save)
    check(config, 1)
    shutil.rmtree(tmp_path / "data" / "b")
    write_source(tmp_path / "data" / "b", tmp_path / "data" / "tokenizer", seed=2)
    with pytest.raises(BadInput, match=rf"source b was prepared anew since {save}"):
        check(config, 1)


def test_a_parents_save_by_its_tokens(config):
    saves = [_save("stable", step, config) for step in (5, 10)]
    tokens = 10 * config.batch_tokens
    assert check(replace(config, start=FromRun(run="stable", tokens=tokens)), 1).start_folder == saves[1]
    with pytest.raises(BadInput) as refused:
        check(replace(config, start=FromRun(run="stable", tokens=tokens + 1)), 1)
    assert f"no save at {tokens + 1:,} tokens" in refused.value.what
    assert refused.value.fix == "its saves: 1,280 tokens (step 5), 2,560 tokens (step 10)"


def test_a_parents_newest_save_whose_records_are_damaged_is_passed_over_and_refused_if_named(config):
    saves = [_save("stable", step, config, done=False) for step in (5, 10)]
    for folder in saves:
        checksums.seal(folder, {})
    rundir.mark_done(rundir.run_folder("stable"))
    branch = replace(config, start=FromRun(run="stable"))
    assert check(branch, 1).start_folder == saves[1]
    for name in ("state.json", "config.json", "model.json"):
        path = saves[1] / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        assert check(branch, 1).start_folder == saves[0], name
        with pytest.raises(BadInput):
            check(replace(branch, start=FromRun(run="stable", step=10)), 1)
        path.write_bytes(whole)
    for folder in saves:
        flip_bit(folder / "ledger.json")
    with pytest.raises(BadInput, match="has no save whose checksums hold"):
        check(branch, 1)


def test_a_branch_cannot_start_from_itself(config):
    _save("run", 5, config, done=False)
    with pytest.raises(BadInput, match=r"run cannot start from itself\n.*--name"):
        check(replace(config, start=FromRun(run="run", step=5)), 1)


@pytest.mark.parametrize(
    ("parents", "branchs", "rate"),
    [
        (ConstantRate(peak=3e-3), CosineRate(peak=2e-3, floor=0.0), "0.003"),
        (ConstantRate(peak=3e-3), CosineRate(peak=3e-3, floor=0.0, warmup_tokens=1000), "0.003"),
        (LinearRate(peak=3e-3, floor=0.0), CosineRate(peak=3e-3, floor=0.0), "0.00225"),
    ],
)
def test_a_learning_rate_that_would_jump_is_refused_unless_allowed(config, parents, branchs, rate):
    _save("stable", 5, replace(config, learning_rate=parents))
    branch = replace(config, learning_rate=branchs, start=FromRun(run="stable", step=5))
    with pytest.raises(BadInput, match=rf"would jump: {rate} in .*\n.*begin at {rate} .*--start.rate-jump"):
        check(branch, 1)
    check(replace(branch, start=replace(branch.start, rate_jump=True)), 1)
    check(replace(branch, learning_rate=ConstantRate(peak=float(rate))), 1)


def test_a_branch_keeps_its_parents_tokenizer(config):
    save = _save("stable", 5, config)
    TrainState(step=5, tokenizer_sha256="1" * 64).write(save)
    branch = replace(config, start=FromRun(run="stable", step=5))
    with pytest.raises(BadInput, match=r"learned from another tokenizer's ids \(111111111111\)"):
        check(branch, 1)
    TrainState(step=5, tokenizer_sha256=check(config, 1).mixture.tokenizer_sha256).write(save)
    check(branch, 1)


def test_a_branch_reads_on_after_its_parent_only_if_asked(config):
    streams = (Stream(prefix=Path("/a/00000"), blocks=(Block(num_samples=9, seed=1),), used=4),)
    save = _save("stable", 5, config, streams=streams)
    branch = replace(config, start=FromRun(run="stable", step=5))
    asked = replace(branch, start=replace(branch.start, skip_consumed=True))
    assert data_phases(branch, None, save) == (Phase(sources=config.data.sources),)
    assert data_phases(asked, None, save) == (Phase(sources=config.data.sources, streams=streams),)
    shorter = replace(asked, data=replace(asked.data, seq_length=16))
    with pytest.raises(BadInput, match=r"sequences of 16 tokens; those that .* read have 32"):
        check(shorter, 1)


def _read(source: SourceConfig, tokens: int) -> tuple[Stream, ...]:
    """Streams of a source's two shards that say that so many tokens of it were read."""
    sequences = tokens // SEQ_LENGTH
    return tuple(
        Stream(prefix=(source.path / shard).resolve(), blocks=(), used=used)
        for shard, used in (("00000", sequences // 2), ("00001", sequences - sequences // 2))
    )


def test_a_branch_that_reads_on_counts_what_its_parent_read(config):
    a, b = config.data.sources
    tokens = check(config, 1).mixture.tokens[1]
    capped = replace(config, data=replace(config.data, sources=(a, replace(b, name="other", max_epochs=1.2))))
    save = _save("stable", 5, config, streams=_read(b, tokens + SEQ_LENGTH))
    before = (tokens + SEQ_LENGTH) // SEQ_LENGTH * SEQ_LENGTH
    planned = round(0.3 * config.budget.train_tokens)
    assert 0.2 < planned / tokens < 1.2
    branch = replace(capped, start=FromRun(run="stable", step=5))
    check(branch, 1)
    reads_on = replace(branch, start=replace(branch.start, skip_consumed=True))
    message = rf"source other .* {planned:,} \+ {before:,} read by the parent of {tokens:,} available"
    with pytest.raises(BadInput, match=message):
        check(reads_on, 1)
    enough = replace(reads_on, data=replace(config.data, sources=(a, replace(b, max_epochs=3))))
    mixture = check(enough, 1).mixture
    assert shared_data(enough.start, mixture, save).endswith(
        "b; this stage reads them on from there, and again once none of it is unread"
    )


def test_a_torn_save_is_never_selected(config):
    run = rundir.run_folder("run")
    _save("run", 5, config)
    _save("run", 10, config, done=False)
    (run / "checkpoints" / ".step_00000015.1.tmp").mkdir()
    rundir.mark_done(run / "checkpoints" / ".step_00000015.1.tmp")
    assert saved_steps(run) == [5]
    assert latest_save(run) == rundir.step_folder(run, 5)


def test_a_run_that_resumes_needs_its_parent_no_more(config):
    _save("run", 5, config)
    parent = lineage.Lineage(name="stable", kind="train", weights_sha256="1")
    lineage.write(
        rundir.run_folder("run"), lineage.Lineage(name="run", kind="train", weights_sha256="2", parent=parent)
    )
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


def _weighed(config: MidTrainConfig, a: float) -> MidTrainConfig:
    first, second = config.data.sources
    sources = (replace(first, weight=a), replace(second, weight=1 - a))
    return replace(config, data=replace(config.data, sources=sources))


def test_other_weights_are_refused_unless_asked_for_before_the_end(config):
    rundir.write_json(rundir.run_folder("run") / "config.json", to_dict(config))
    with pytest.raises(BadInput, match=r"(?s)0\.weight: 0\.7 in the folder, 0\.5 asked for\n.*--reweigh"):
        finished(_weighed(config, 0.5))
    assert not finished(_weighed(config, 0.5), reweigh=True)
    with pytest.raises(BadInput, match="seed: 1234 in the folder"):
        finished(replace(_weighed(config, 0.5), seed=99), reweigh=True)
    rundir.mark_done(rundir.run_folder("run"))
    with pytest.raises(BadInput, match="other settings"):
        finished(_weighed(config, 0.5), reweigh=True)


def test_epochs_of_a_source_count_what_was_read_by_other_weights(config):
    rundir.write_json(rundir.run_folder("run") / "config.json", to_dict(config))
    tokens, size = check(config, 1).mixture.tokens[1], config.batch_tokens
    _save("run", 10, config, streams=_read(config.data.sources[1], 2 * tokens))
    lineage.write(rundir.run_folder("run"), lineage.Lineage(name="run", kind="train", weights_sha256="2"))
    other = _weighed(config, 0.5)
    a, b = other.data.sources
    capped = replace(other, data=replace(other.data, sources=(a, replace(b, max_epochs=2.1))))
    before = 2 * tokens // SEQ_LENGTH * SEQ_LENGTH
    epochs = (before + 5 * size) / tokens
    assert epochs > 2.1
    message = rf"weight 0.5 x {10 * size:,} tokens = {5 * size:,} \+ {before:,} read before .* {epochs:.2f} epochs"
    with pytest.raises(BadInput, match=message):
        check(capped, 1, reweigh=True)


def test_a_run_that_has_read_its_budget_cannot_be_weighed_anew(config):
    rundir.write_json(rundir.run_folder("run") / "config.json", to_dict(config))
    _save("run", 20, config)
    lineage.write(rundir.run_folder("run"), lineage.Lineage(name="run", kind="train", weights_sha256="2"))
    check(config, 1)
    with pytest.raises(BadInput, match="none is left to weigh anew"):
        check(_weighed(config, 0.5), 1, reweigh=True)


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
