"""`octo pipeline`: the stages in a row, each a process of its own, each skipped once its folder is DONE.

Nothing is decided here but the order; every stage can be run alone with the command that the log shows.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_octo import console, rundir, stage_log
from megatron_octo.config.base import to_dict
from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.data.prepare import check_output
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.platform.process import GRACE_S, octo_command, run_and_watch, terminate_as_interrupt
from megatron_octo.train.run import finished

log = console.logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One process and the folders it leaves."""

    name: str
    argv: tuple[str, ...]
    outputs: tuple[Path, ...]

    @property
    def done(self) -> bool:
        """Whether an earlier run finished it."""
        return bool(self.outputs) and all(map(rundir.is_done, self.outputs))


def stages(config: PipelineConfig) -> Iterator[Stage]:
    """The stages of a pipeline in their order. Their settings are read from the pipeline's folder."""
    settings = str(_settings_file(config))
    if config.corpora:
        yield Stage(name="generate corpora", argv=("data", "generate", settings), outputs=(config.corpora.output,))
    if config.tokenizer:
        yield Stage(name="train tokenizer", argv=("data", "tokenizer", settings), outputs=(config.tokenizer.output,))
    if config.prepare:
        outputs = tuple(source.output for source in config.prepare)
        yield Stage(name="prepare data", argv=("data", "prepare", settings), outputs=outputs)
    if config.base:
        yield Stage(name="random base", argv=("convert", "random-base", settings), outputs=(config.base.output,))
    argv = ("convert", "from-hf", str(config.base_folder), str(config.import_folder))
    yield Stage(name="import base", argv=argv, outputs=(config.import_folder,))
    for stage in (config.stable, *config.branches):
        yield from _train_and_export(config, stage)
    yield _evaluate(config, "before")
    if config.rl:
        outputs = tuple(each.output for each in config.rl)
        yield Stage(name="reinforcement learning", argv=("rl", settings), outputs=outputs)
    if config.evaluate_after:
        yield _evaluate(config, "after")
    yield Stage(name="report", argv=("report", settings), outputs=())


def run_pipeline(config: PipelineConfig) -> None:
    """Run what is not DONE yet; a table of the times at the end.

    Raises:
        BadInput: the pipeline's folder, or a stage's, is in use or was made with other settings.
        OctoError: a stage failed; running the pipeline again goes on from there.
    """
    folder = rundir.run_folder(config.name)
    check(config)
    with rundir.lock(folder), terminate_as_interrupt():
        write_settings(config)
        todo = list(stages(config))
        for number, stage in enumerate(todo, 1):
            _run_stage(stage, f"[{number}/{len(todo)}] {stage.name}", folder)
        _show_costs(folder)


def check(config: PipelineConfig) -> None:
    """Refuse a pipeline that could not come to its end; reads only.

    Raises:
        BadInput: its folder or a stage's is another's, a stage's input is missing, or stages do not fit together.
    """
    folder = rundir.run_folder(config.name)
    rundir.check_config(folder, to_dict(config), fix="use another OCTO_RUNS, or the settings of the folder")
    check_inputs(config)
    _check_outputs(config)


def write_settings(config: PipelineConfig) -> None:
    """Write the pipeline's settings, and those of each run, where `stages` says that they are."""
    rundir.claim(rundir.run_folder(config.name), to_dict(config))
    runs: tuple[MidTrainConfig | RLConfig, ...] = (config.stable, *config.branches, *config.rl)
    for each in runs:
        rundir.write_json(stage_file(config, each), to_dict(each))


def check_inputs(config: PipelineConfig) -> None:
    """Refuse a stage that reads what neither is there nor is written before it, or that fits no other; reads only.

    Raises:
        BadInput: so it is; the message names the setting.
    """
    models = {stage.name: stage.model for stage in (config.stable, *config.branches)}
    if config.base:
        models["base"] = config.base.model
    for name, model in models.items():
        if model != config.stable.model:
            differing = ", ".join(
                f"{field} {old} and {new}"
                for field, old, new in rundir.differences(to_dict(config.stable.model), to_dict(model))
            )
            raise BadInput(
                f"pipeline {config.name}: the models of {config.stable.name} and {name} differ: {differing}",
                fix="give all stages the same model: each goes on with the weights of the one before",
            )
    written: set[Path] = set()
    for setting, path, outputs in _reads_and_writes(config):
        if path is not None and path not in written and not path.exists():
            raise BadInput(
                f"pipeline {config.name}: {setting} {path} is not there, and no stage before writes it",
                fix="correct the path, or add the stage that writes it",
            )
        written.update(outputs)


def _reads_and_writes(config: PipelineConfig) -> Iterator[tuple[str, Path | None, tuple[Path, ...]]]:
    """In the stages' order: (a setting, the path that it reads or None, the paths that are there afterwards)."""
    corpora = config.corpora
    if corpora:
        names = [*(name for name, _ in corpora.documents), "rl_train", "heldout"]
        yield "corpora", None, tuple(corpora.output / f"{name}.jsonl" for name in names)
    if config.tokenizer:
        for number, each in enumerate(config.tokenizer.inputs):
            yield f"tokenizer.inputs.{number}.input", each.input, ()
        yield "tokenizer", None, (config.tokenizer.output,)
    for number, source in enumerate(config.prepare):
        yield f"prepare.{number}.input", _one_file(source.input), ()
        yield f"prepare.{number}.tokenizer", source.tokenizer, (source.output,)
    if config.base:
        yield "base.tokenizer", config.base.tokenizer, (config.base.output,)
    yield "base_folder", config.base_folder, (config.import_folder,)
    for stage in (config.stable, *config.branches):
        prefix = "stable" if stage is config.stable else f"branches.{config.branches.index(stage)}"
        yield f"{prefix}.data.tokenizer", stage.data.tokenizer, ()
        for number, mixed in enumerate(stage.data.sources):
            yield f"{prefix}.data.sources.{number}.path", mixed.path, ()
        folder = rundir.run_folder(stage.name)
        yield prefix, None, (folder, folder / "hf" / f"step_{stage.num_steps:08d}")
    yield from _evaluation_reads("evaluate_before", config.evaluate_before)
    for number, run in enumerate(config.rl):
        yield f"rl.{number}.model", run.model, ()
        yield f"rl.{number}.prompts", _one_file(run.prompts), (run.output / "hf",)
    yield from _evaluation_reads("evaluate_after", config.evaluate_after)


def _one_file(path: Path | None) -> Path | None:
    """An input, unless it is a pattern: which files fit it shows when they are read."""
    return None if path is None or glob.has_magic(str(path)) else path


def _evaluation_reads(name: str, config: EvaluateConfig | None) -> Iterator[tuple[str, Path | None, tuple[Path, ...]]]:
    if config:
        yield f"{name}.problems", config.problems, ()
        for number, scored in enumerate(config.models):
            yield f"{name}.models.{number}.model", scored.model, ()


def _check_outputs(config: PipelineConfig) -> None:
    """Refuse the first stage whose folder is another's before any has run; changes nothing.

    Raises:
        BadInput: a stage's folder is in use, was made with other settings, or holds something else.
    """
    for made in (config.corpora, config.tokenizer):
        if made:
            rundir.is_written(made.output, to_dict(made))
    # those of a killed pipeline take a moment to end
    for source in config.prepare:  # a source that was begun goes on
        rundir.wait_until_free(source.output, grace_s=GRACE_S)
        check_output(source)
    for stage in (config.stable, *config.branches):
        rundir.wait_until_free(rundir.run_folder(stage.name), grace_s=GRACE_S)
        finished(stage)
    for run in config.rl:
        rundir.wait_until_free(run.output, grace_s=GRACE_S)
        rundir.check_config(run.output, to_dict(run))


def _train_and_export(config: PipelineConfig, stage: MidTrainConfig) -> Iterator[Stage]:
    run_folder = rundir.run_folder(stage.name)
    settings = str(stage_file(config, stage))
    argv = ("train", settings, "--ranks", str(config.train_ranks))
    yield Stage(name=f"train {stage.name}", argv=argv, outputs=(run_folder,))
    last = rundir.step_folder(run_folder, stage.num_steps)
    export = run_folder / "hf" / last.name
    # by name: the run's newest save is an earlier one after a STOP file
    yield Stage(name=f"export {stage.name}", argv=("convert", "to-hf", str(last), str(export)), outputs=(export,))


def _evaluate(config: PipelineConfig, when: str) -> Stage:
    evaluation = config.evaluate_before if when == "before" else config.evaluate_after
    outputs = tuple(scored.output for scored in evaluation.models) if evaluation else ()
    argv = ("evaluate", str(_settings_file(config)), "--when", when)
    return Stage(name=f"evaluate {when} RL", argv=argv, outputs=outputs)


def _run_stage(stage: Stage, title: str, folder: Path) -> None:
    if stage.done:
        log.info("%s: done already", title)
        return
    log.info("%s: octo %s", title, " ".join(stage.argv))
    started, seconds = time.time(), 0.0

    def note(elapsed_s: float, peak_gib: float) -> None:
        nonlocal seconds
        seconds = round(elapsed_s, 2)
        attempt = stage_log.Attempt(stage=stage.name, started=started, seconds=seconds, peak_gib=round(peak_gib, 2))
        stage_log.record(folder, attempt, replace_earlier=not stage.outputs)

    note(0.0, 0.0)  # killed before the first measurement, it has still been there
    code = run_and_watch(octo_command(*stage.argv), note)
    if code != 0:
        raise (BadInput if code == BadInput.exit_code else OctoError)(
            f"stage {stage.name!r} ended with exit code {code}",
            fix=f"see its message above; run the pipeline again to go on from here; alone: octo {' '.join(stage.argv)}",
        )
    if stage.outputs and not stage.done:
        raise OctoError(f"stage {stage.name!r} was asked to stop", fix="run the pipeline again to go on from there")
    log.info("%s: %s", title, console.duration(seconds))


def _show_costs(folder: Path) -> None:
    costs = stage_log.costs(folder)
    rows = [(each.stage, console.duration(each.seconds), f"{each.peak_gib:.1f} GiB") for each in costs]
    seconds, peak = sum(each.seconds for each in costs), max(each.peak_gib for each in costs)
    whole = ("all", console.duration(seconds), f"{peak:.1f} GiB")
    console.table("time and memory a stage", ("stage", "time", "peak memory"), [*rows, whole])


def _settings_file(config: PipelineConfig) -> Path:
    return rundir.run_folder(config.name) / "config.json"


def stage_file(config: PipelineConfig, stage: MidTrainConfig | RLConfig) -> Path:
    """Where the settings of a pipeline's run are."""
    return rundir.run_folder(config.name) / "stages" / f"{stage.name}.json"
