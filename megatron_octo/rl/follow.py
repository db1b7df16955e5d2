"""Reads OpenRLHF's lines as they come: log file, metrics, a console line a step, and the watch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from megatron_octo import console, rundir
from megatron_octo.config.rl import RLConfig
from megatron_octo.rl import collect, saves, watch
from megatron_octo.rl.board import Board
from megatron_octo.rl.command import TENSORBOARD

LOG, ROLL_BACKS = "log/openrlhf.log", "roll_backs.json"

log = console.logger(__name__)


class Follower:
    """What a run has reported so far, earlier attempts included."""

    def __init__(
        self,
        config: RLConfig,
        rows: list[collect.Row],
        file: TextIO,
        board: Board,
        *,
        done: int,
        time_before_s: float,
        cuda: bool,
    ) -> None:
        self.rows = rows
        self.recent: list[str] = []
        """Lines since the last step: where the reason of a failure is."""
        self.ends_after: int | None = None
        """The last save when a STOP file was found: the next one ends the run. None where nobody asked."""
        self._config, self._file, self._board, self._cuda = config, file, board, cuda
        self._roll_backs = len(roll_backs(config.output))
        self._time_before_s, self._began = time_before_s, time.monotonic()
        self._done, self._job_ends_s = done, float(os.environ.get("SLURM_JOB_END_TIME") or "inf")

    def line(self, text: str) -> None:
        """Take one line.

        Raises:
            watch.Trouble: it reports a step that shows that the run must not go on like this.
        """
        self._file.write(text + "\n")
        self._file.flush()
        self.recent.append(text)
        row = collect.parse_step(text)
        if row is not None:
            self.recent.clear()
            row["rl/updates"] = row["step"] * self._config.updates_per_step
            row["rl/most_vllm_kl"] = watch.largest_vllm_kl(self._config.watch, cuda=self._cuda)
            row["time_s"] = round(self._time_before_s + time.monotonic() - self._began, 3)
            self.rows.append(row)
            collect.append_metrics(self._config.output / collect.METRICS, row)
            self._board.add(row)
            log.info("%s", step_line(row, self._config.num_steps))
            self._judge(row)
        scores = collect.parse_validation(text)
        if scores is not None:
            scores["rl/updates"] = scores["step"] * self._config.updates_per_step
            self.rows = collect.joined(self.rows, scores)
            collect.write_metrics(self._config.output / collect.METRICS, self.rows)
            self._board.add(scores)
            log.info("%s", validation_line(scores))

    def poll(self) -> None:
        """Look after the saves, and whether someone asks the run to stop."""
        output = self._config.output
        saves.take(self._config, self.rows)
        if self.ends_after is None and (output / rundir.STOP).exists():  # it stays until it is heeded, maybe by a rerun
            self.ends_after = saves.last(output)
            log.info("found %s: the next save, and the end", output / rundir.STOP)

    def _judge(self, row: collect.Row) -> None:
        if late := late_save(self._config, self.rows, done=self._done, left_s=self._job_ends_s - time.time()):
            log.warning("%s", late)
            self._job_ends_s = float("inf")  # said once
        if row.get("rl/reward_error_share", 0.0) > 0:
            log.warning("step %d: %.1f%% of the rewards failed", row["step"], 100 * row["rl/reward_error_share"])
        finding = watch.judge(self._config.watch, self.rows, roll_backs=self._roll_backs, cuda=self._cuda)
        if finding is None:
            return
        if finding.action != "log":
            raise watch.Trouble(finding)
        log.warning("step %d: %s", finding.step, finding.what)


@contextmanager
def following(config: RLConfig, done: int, *, cuda: bool) -> Iterator[Follower]:
    """Follow a run from after `done` steps: what metrics.jsonl has of later ones will be done again."""
    output = config.output
    path = output / collect.METRICS
    before = collect.read_metrics(path)
    rows = [row for row in before if row["step"] <= done]
    collect.write_metrics(path, rows)
    time_before_s = max((row["time_s"] for row in before), default=0.0)
    (output / LOG).parent.mkdir(exist_ok=True)
    board = Board(output / TENSORBOARD, updates_done=done * config.updates_per_step)
    try:
        with (output / LOG).open("a") as file:
            yield Follower(config, rows, file, board, done=done, time_before_s=time_before_s, cuda=cuda)
    finally:
        board.close()


def late_save(config: RLConfig, rows: Sequence[collect.Row], *, done: int, left_s: float) -> str:
    """Why a start that went on after `done` steps will not save within `left_s` seconds; empty if it has or will.

    The first step of a start says little: it is the slowest.
    """
    step, every = int(rows[-1]["step"]), config.save_every_steps
    save = min((done // every + 1) * every, config.num_steps)
    seconds = [row["rl/step_s"] for row in rows if row["step"] > done + 1 and "rl/step_s" in row]
    if step >= save or not seconds or (needed_s := fmean(seconds) * (save - step)) <= left_s:
        return ""
    return (
        f"the first save of this start, of step {save}, is {console.duration(needed_s)} away, and this job's time is "
        f"up in {console.duration(max(left_s, 0))}: what it does until then will be lost\n"
        f"  fix: a save_every_steps below {every}, which a rerun may change, or a longer time limit"
    )


def roll_backs(output: Path) -> Sequence[dict[str, Any]]:
    """The roll backs of a run so far: at which step, to which, and why."""
    path = output / ROLL_BACKS
    return rundir.read_json(path) if path.exists() else []


def step_line(row: collect.Row, num_steps: int) -> str:
    """A step for the console."""
    parts = [f"step {int(row['step'])}/{num_steps}"]
    for name, label, form in (
        ("rl/reward_mean", "reward", "{:+.3f}"),
        ("rl/accuracy", "right", "{:.1%}"),
        ("rl/response_length_mean", "length", "{:.1f}"),
        ("rl/truncated_share", "cut off", "{:.1%}"),
        ("rl/vllm_kl", "vllm_kl", "{:.1e}"),
        ("optim/grad_norm", "grad", "{:.2f}"),
        ("rl/step_s", "", "{:.1f}s"),
    ):
        if name in row:
            parts.append(f"{label} {form.format(row[name])}".strip())
    return "  ".join(parts)


def validation_line(scores: collect.Row) -> str:
    """A validation for the console."""
    right = {name.split("/")[1]: value for name, value in scores.items() if name.endswith("/accuracy")}
    return "  ".join([f"step {int(scores['step'])}", "validation", *(f"{name} {v:.1%}" for name, v in right.items())])
