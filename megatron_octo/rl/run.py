"""One or more RL runs: check, run OpenRLHF, watch each step, and leave a Hugging Face folder.

OpenRLHF runs as a process of its own (`rl/cluster.py`); nothing of it is imported here. A run that
was killed goes on from its last checkpoint, with the prompts that it had not used yet.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_octo import console, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.rl import LengthStage, RLConfig
from megatron_octo.errors import OctoError, StoppedByWatch, VerificationError
from megatron_octo.rl import agent, collect, prompts, saves, watch
from megatron_octo.rl.cluster import Cluster, RunFailed, cluster, meaningful, require_linux
from megatron_octo.rl.command import AGENT, FINAL, PROMPTS, TENSORBOARD, VALIDATION, command
from megatron_octo.rl.follow import LOG, ROLL_BACKS, Follower, following, roll_backs
from megatron_octo.rl.preflight import check, has_gpu

HF = "hf"
MAY_DIFFER = ("watch", "save_every_steps", "keep_last_saves")
"""Settings that a rerun may change."""

log = console.logger(__name__)


class Stopped(Exception):
    """Someone asked a run to stop, and it is saved."""


def run_all(configs: Sequence[RLConfig]) -> list[Path]:
    """Run stages of RL one after the other on one Ray cluster; returns the Hugging Face folders of those that are DONE.

    Those that are DONE are skipped; all the others are checked before the first starts. A STOP file in the folder of
    one ends it after its next save, and leaves the others.

    Raises:
        BadInput: a model, a prompt file or a setting is wrong. Nothing is written then.
        VerificationError: metrics or weights are missing, or a border of the length schedule was missed.
        StoppedByWatch: the watch stopped a run.
        OctoError: OpenRLHF failed; the message has the end of its log.
    """
    pending = [config for config in configs if not _skip(config)]
    if pending:
        require_linux()
        cuda = has_gpu()
        plans = [check(config, cuda=cuda) for config in pending]
        most = {name: max(getattr(config, name) for config in pending) for name in ("num_nodes", "num_gpus")}
        work = deque(zip(pending, plans, strict=True))
        while work:
            # one that ends at a border of its length schedule, or in trouble, leaves no cluster to go on with
            try:
                with cluster(**most, cuda=cuda) as engine:
                    while work and _run(work[0][0], *work[0][1], engine, cuda=cuda):
                        work.popleft()
            except watch.Trouble as trouble:
                _answer(work[0][0], trouble.finding)
            except Stopped as stopped:
                log.info("%s", stopped)
                break
    return [config.output / HF for config in configs if rundir.is_done(config.output)]


def check_settings(config: RLConfig) -> None:
    """Refuse a folder that was made with other settings than a rerun may change.

    Raises:
        BadInput: so it is.
    """
    rundir.check_config(
        config.output,
        to_dict(config),
        fix="give this run another --output, or the settings of the folder",
        may_differ=MAY_DIFFER,
    )


def _skip(config: RLConfig) -> bool:
    rundir.check_free(config.output)
    check_settings(config)
    if rundir.is_done(config.output):
        log.info("%s: RL is done, skipped", config.output)
        return True
    return False


def _run(
    config: RLConfig, plan: prompts.PromptPlan, report: prompts.PromptReport, engine: Cluster, *, cuda: bool
) -> bool:
    """Go on with a run to its end, or to the next border of its length schedule; returns whether that is its end."""
    output = config.output
    with rundir.lock(output):
        rundir.claim(output, to_dict(config), may_differ=MAY_DIFFER)
        began = time.monotonic()
        prompts.write_prompts(output / PROMPTS, plan.prompts)
        if plan.validation:
            prompts.write_prompts(output / VALIDATION, plan.validation)
        rundir.write_atomic(output / AGENT, agent.FILE)
        rundir.write_json(output / prompts.REPORT, asdict(report))
        log.info("%s: %s", config.name, report.describe(config))
        done = saves.resume(output)
        stage = next((each for each in config.stages if each.end > done), config.stages[-1])
        if done:
            log.info("%s: goes on after step %d of %d", config.name, done, config.num_steps)
        seeded = replace(config, seed=config.seed + len(roll_backs(output)))  # the order of the prompts is in the save
        arguments = command(seeded, stage=stage, num_episodes=plan.num_episodes, cuda=cuda)
        with following(config, done, cuda=cuda) as follower:
            length = f"{stage.max_response_tokens:,}"
            log.info("%s: OpenRLHF starts, responses of up to %s tokens; log: %s", config.name, length, output / LOG)
            try:
                ended = engine.run(arguments, follower.line, lambda: _may_end(config, stage, follower))
            except RunFailed as failure:
                raise _failure(config, follower, failure) from None
        if not ended and follower.ends_after is not None:
            step = saves.last(output)
            rundir.take_file(output / rundir.STOP)
            raise Stopped(f"{config.name}: stopped after step {step}, saved; run it again to go on")
        if not ended:
            log.info("%s: step %d is saved, and longer responses begin", config.name, stage.end)
            return False
        rows = _all_rows(config)
        saves.take(config, rows)
        _finish(config, rows)
        log.info("%s: done in %s; %s", config.name, console.duration(time.monotonic() - began), output / HF)
        return True


def _all_rows(config: RLConfig) -> list[collect.Row]:
    """The metrics of a run that ended, with TensorBoard's for lines that were lost.

    Raises:
        VerificationError: some step was reported by neither.
    """
    path = config.output / collect.METRICS
    rows = collect.read_metrics(path)
    if len(rows) < config.num_steps:
        events = {
            step: {**row, "rl/updates": step * config.updates_per_step}
            for step, row in collect.read_events(config.output / TENSORBOARD).items()
        }
        rows = collect.fill_gaps(rows, events, config.num_steps)
        collect.write_metrics(path, rows)
    if len(rows) != config.num_steps:
        raise VerificationError(
            f"{config.name}: OpenRLHF reported {len(rows)} steps instead of {config.num_steps}",
            fix=f"see {config.output / LOG}",
        )
    return rows


def _answer(config: RLConfig, finding: watch.Finding) -> None:
    """Do what a finding asks for, now that OpenRLHF has ended: have the run go back to an earlier save, or stop.

    Raises:
        StoppedByWatch: it is to stop, or there is no save to go back to.
    """
    output = config.output
    said = f"{config.name}, step {finding.step}: {finding.what}"
    with rundir.lock(output):
        steps = saves.checkpoints(output)
        good = max((step for step in steps if step < finding.since), default=0)
        if finding.action == "roll_back" and good:
            back = {"step": finding.step, "to": good, "what": finding.what}
            rundir.write_json(output / ROLL_BACKS, [*roll_backs(output), back])
            saves.go_back(output, good)
            log.warning("%s; rolled back to step %d, the samples that follow are drawn anew", said, good)
            return
        # OpenRLHF may have saved the step at fault while it was being ended
        saves.go_back(output, max((step for step in steps if step < finding.step), default=0))
    before = f"the last save from before step {finding.since} is of step {good}" if good else "no save is from before"
    raise StoppedByWatch(
        f"{said}; {before}",
        fix=f"see {output / LOG} and docs/rl.md; run it again with watch.on_* roll_back to go back to such a save, "
        "log to go on from the last one, or begin anew with other settings in another folder",
    )


def _may_end(config: RLConfig, stage: LengthStage, follower: Follower) -> bool:
    """Look after the saves; whether one is there, with its validation, that ends the stage or that someone asked for.

    After the last step of all the run ends by itself.

    Raises:
        VerificationError: one after the stage is there: it was trained with the responses of the stage before.
    """
    follower.poll()
    saved = saves.last(config.output)
    if saved > stage.end:
        raise VerificationError(
            f"{config.name}: step {saved} was saved before the run could be stopped at step {stage.end}",
            fix="save less often (save_every_steps), or put the border elsewhere; begin anew in another folder",
        )
    asked = follower.ends_after is not None and saved > follower.ends_after
    if saved == config.num_steps or not (asked or saved == stage.end):
        return False
    whole = saved in saves.copies(config.output)
    return whole and (not config.validates_at(saved) or _is_validated(follower.rows, saved))


def _is_validated(rows: Sequence[collect.Row], step: int) -> bool:
    return any(row["step"] == step and collect.validation(row) is not None for row in rows)


def _failure(config: RLConfig, follower: Follower, failure: RunFailed) -> OctoError:
    end = "\n".join(f"    {line}" for line in meaningful(follower.recent))
    return OctoError(
        f"{config.name}: OpenRLHF failed: {failure}\n{end}",
        fix=f"the whole log is {config.output / LOG}; run it again to go on from the last checkpoint",
    )


def _finish(config: RLConfig, rows: Sequence[collect.Row]) -> None:
    """OpenRLHF's final folder -> hf/; then DONE."""
    output, final = config.output, config.output / FINAL
    if not any(final.glob("*.safetensors")):
        raise VerificationError(f"{config.name}: OpenRLHF left no weights in {final}", fix=f"see {output / LOG}")
    saves.rotate(config, rows)
    saves.write_copy(config, final, output / HF, step=config.num_steps, rows=rows)
    shutil.rmtree(final)
    rundir.mark_done(output)
