"""What OpenRLHF reports of a step -> metrics.jsonl: the one place that names its numbers.

The controller's log line of a step has everything at once; TensorBoard files have the same numbers,
minutes later, and fill in for lines that were lost on the way.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_octo import rundir

METRICS = "metrics.jsonl"
STEP_LINE = re.compile(r"Global step (\d+): (\{.*\})")
VALIDATION_LINE = re.compile(r"Evaluation completed in .*, global_step (\d+), eval_metrics: (\{.*\})")
VALIDATION_NAME = re.compile(r"eval_(.+)_(pass1|response_length_mean|truncated_rate)")
VALIDATION_NAMES = {
    "pass1": "accuracy",
    "response_length_mean": "response_length_mean",
    "truncated_rate": "truncated_share",
}
# OpenRLHF's name -> ours. Rollout values come before the samples are cut into training packs.
NAMES = {
    "rollout/reward_mean": "rl/reward_mean",
    "acc": "rl/accuracy",
    # extra_logs of our reward and agent (acc is one too)
    "boxed": "rl/boxed_share",
    "boxed_at_start": "rl/boxed_at_start_share",
    "repetition": "rl/repetition_share",
    "entropy": "rl/entropy",
    "right_tokens": "rl/right_tokens",
    "reward_error": "rl/reward_error_share",
    "reward_s": "rl/reward_s",
    "rollout/response_length_mean": "rl/response_length_mean",
    "rollout/truncated_rate": "rl/truncated_share",
    "vllm_kl": "rl/vllm_kl",
    "is_filter_ratio": "rl/is_clip_share",
    "policy_loss": "rl/policy_loss",
    "ppo_clip_ratio": "rl/clip_share",
    "actor_grad_norm": "optim/grad_norm",
    "actor_lr": "optim/lr",
    "timing/generation": "rl/generation_s",
    "timing/make_experience": "rl/experience_s",
    "timing/ppo_train": "rl/train_s",
    "timing/broadcast": "rl/sync_s",
    "timing/step_total": "rl/step_s",
}
Row = dict[str, float]


def parse_step(line: str) -> Row | None:
    """The metrics of a step that a log line reports, None for any other line."""
    return _parse(STEP_LINE, line)


def parse_validation(line: str) -> Row | None:
    """The scores of a step's validation that a log line reports, None for any other line."""
    return _parse(VALIDATION_LINE, line)


def _parse(pattern: re.Pattern[str], line: str) -> Row | None:
    match = pattern.search(line)
    if match is None:
        return None
    values = ast.literal_eval(re.sub(r"(?<= )(nan|-?inf)\b", r"'\1'", match[2]))
    return {"step": int(match[1]), **rename(values)}


def validation(row: Row) -> float | None:
    """What a row says of problems that are not trained on: the mean accuracy over their sets; None if not asked."""
    scores = [value for name, value in row.items() if name.startswith("valid/") and name.endswith("/accuracy")]
    return fmean(scores) if scores else None


def rename(values: Mapping[str, Any]) -> Row:
    """OpenRLHF's values under our names; what has no name of ours, or is no finite number, is left out."""
    found = {ours: float(values[theirs]) for theirs, ours in NAMES.items() if values.get(theirs) is not None}
    for theirs, value in values.items():
        if match := VALIDATION_NAME.fullmatch(theirs):
            found[f"valid/{match[1]}/{VALIDATION_NAMES[match[2]]}"] = float(value)
    return _with_lengths({name: value for name, value in found.items() if math.isfinite(value)})


def _with_lengths(row: Row) -> Row:
    """Add the mean lengths of right and of wrong responses: OpenRLHF only has means over all of them."""
    right_tokens = row.pop("rl/right_tokens", None)
    accuracy, length = row.get("rl/accuracy"), row.get("rl/response_length_mean")
    if right_tokens is not None and accuracy is not None and length is not None:
        if accuracy > 0:
            row["rl/right_length_mean"] = right_tokens / accuracy
        if accuracy < 1:
            row["rl/wrong_length_mean"] = max(0.0, length - right_tokens) / (1 - accuracy)
    return row


def read_events(folder: Path) -> dict[int, Row]:
    """The metrics of each rollout step in OpenRLHF's TensorBoard files below `folder`; of one done twice, the later.

    Ours (`rl/board.py`), which are over updates, have none of its names.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    latest: dict[int, dict[str, tuple[float, float]]] = {}
    for run in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                values = latest.setdefault(event.step, {})
                name = tag.removeprefix("train/").removeprefix("eval/")
                values[name] = max(values.get(name, (-math.inf, 0.0)), (event.wall_time, event.value))
    return {
        step: {"step": step, **row}
        for step, values in sorted(latest.items())
        if (row := rename({name: value for name, (_, value) in values.items()}))
    }


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; a torn last line, which a kill leaves, is dropped."""
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_metrics(path: Path, rows: Iterable[Row]) -> None:
    """Replace the metrics file."""
    rundir.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_metrics(path: Path, row: Row) -> None:
    """Add a step."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def joined(rows: Iterable[Row], scores: Row) -> list[Row]:
    """The rows, with scores in that of their step, if it is there."""
    return [{**row, **scores} if row["step"] == scores["step"] else row for row in rows]


def fill_gaps(rows: Iterable[Row], events: Mapping[int, Row], num_steps: int) -> list[Row]:
    """One row a step, 1 to `num_steps`: ours where there is one, else TensorBoard's, timed as the step before."""
    ours = {int(row["step"]): row for row in rows}
    filled: list[Row] = []
    for step in range(1, num_steps + 1):
        if (row := ours.get(step)) is None and (row := events.get(step)) is not None:
            row = {**row, "time_s": filled[-1]["time_s"] if filled else 0.0}
        if row is not None:
            filled.append(row)
    return filled
