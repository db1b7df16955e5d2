"""The order of the stages, and which are skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.launch import pipeline
from megatron_octo.stage_log import costs
from tests.conftest import REPOSITORY, snapshot


@pytest.fixture
def config(runs) -> PipelineConfig:
    return load_recipe(str(REPOSITORY / "recipes" / "miniature.py"), PipelineConfig)


def test_a_branch_is_trained_after_stable_and_scored_before_rl(config):
    names = [stage.name for stage in pipeline.stages(config)]
    order = [
        "generate corpora",
        "import base",
        "train miniature-stable",
        "train miniature-decay-long",
        "export miniature-decay-long",
        "evaluate before RL",
        "reinforcement learning",
        "evaluate after RL",
        "report",
    ]
    assert [name for name in names if name in order] == order


def test_stages_left_out_of_the_settings_are_not_run(config):
    bare = replace(config, corpora=None, tokenizer=None, base=None, prepare=(), rl=(), evaluate_after=None, branches=())
    assert [stage.name for stage in pipeline.stages(bare)] == [
        "import base",
        "train miniature-stable",
        "export miniature-stable",
        "evaluate before RL",
        "report",
    ]


def test_rl_s_prompts_may_be_a_pattern_but_no_file_that_nothing_writes(config, runs):
    def with_prompts(name):
        return replace(config, rl=tuple(replace(each, prompts=runs / name) for each in config.rl))

    pipeline.check_inputs(with_prompts("*.jsonl"))
    with pytest.raises(BadInput, match=r"rl\.0\.prompts .*all\.jsonl is not there, and no stage before writes it"):
        pipeline.check_inputs(with_prompts("all.jsonl"))


@pytest.fixture
def started(config, monkeypatch) -> list[str]:
    """Run no process: note which stage would have run, finish its folders, fail at the export of `long`."""
    todo = {stage.argv: stage for stage in pipeline.stages(config)}
    names: list[str] = []

    def run(argv, note):
        stage = todo[tuple(argv[argv.index("megatron_octo") + 1 :])]
        names.append(stage.name)
        if stage.name == "export miniature-decay-long" and names.count(stage.name) == 1:
            return 1
        for output in stage.outputs:
            rundir.mark_done(output)
        note(2.0, 0.5)
        return 0

    monkeypatch.setattr(pipeline, "run_and_watch", run)
    return names


def test_a_failed_stage_stops_the_row_and_a_rerun_goes_on_from_there(config, started, runs):
    with pytest.raises(OctoError, match="'export miniature-decay-long' ended with exit code 1"):
        pipeline.run_pipeline(config)
    assert started[-1] == "export miniature-decay-long"
    started.clear()
    started.append("export miniature-decay-long")
    pipeline.run_pipeline(config)
    assert started[1:3] == ["export miniature-decay-long", "train miniature-decay-hybrid"]
    assert started[-1] == "report"
    assert [cost.stage for cost in costs(runs / "miniature")] == [stage.name for stage in pipeline.stages(config)]


def test_a_source_whose_preparation_was_killed_is_no_obstacle(config, started):
    source = config.prepare[0]
    rundir.claim(source.output, to_dict(source))
    (source.output / ".00000.bin").write_bytes(b"begun")
    with pytest.raises(OctoError, match="ended with exit code 1"):  # the one that `started` always fails
        pipeline.run_pipeline(config)
    assert "prepare data" in started


def test_a_stage_killed_before_it_was_measured_is_in_the_log(config, monkeypatch, runs):
    def killed(argv, note):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_and_watch", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_pipeline(config)
    assert [cost.stage for cost in costs(runs / "miniature")] == ["generate corpora"]


def test_a_stage_folder_of_another_run_is_refused_before_any_stage_runs(config, started, runs):
    other = replace(config.rl[-1], learning_rate=1.0)
    rundir.claim(other.output, to_dict(other))
    before = snapshot(runs)
    with pytest.raises(BadInput, match=r"learning_rate: 1\.0 in the folder"):
        pipeline.run_pipeline(config)
    assert not started
    assert snapshot(runs) == before


def test_a_stage_that_was_asked_to_stop_stops_the_row(config, started, monkeypatch):
    run = pipeline.run_and_watch

    def stopped(argv, note):
        if argv[-3].endswith("miniature-stable.json"):
            started.append("train miniature-stable")
            return 0  # with a save, without DONE
        return run(argv, note)

    monkeypatch.setattr(pipeline, "run_and_watch", stopped)
    with pytest.raises(OctoError, match="'train miniature-stable' was asked to stop"):
        pipeline.run_pipeline(config)
    assert started[-1] == "train miniature-stable"
