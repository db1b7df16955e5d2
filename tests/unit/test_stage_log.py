"""What stages cost, over attempts that ended and attempts that were killed."""

from __future__ import annotations

import pytest

from megatron_octo.errors import BadInput
from megatron_octo.stage_log import FILE, Attempt, StageCost, costs, record


def attempt(stage: str, started: float, seconds: float, peak_gib: float = 1.0) -> Attempt:
    return Attempt(stage=stage, started=started, seconds=seconds, peak_gib=peak_gib)


def test_a_running_attempt_counts_with_its_last_note_and_attempts_add_up(tmp_path):
    record(tmp_path, attempt("train", 1.0, 10.0, 2.0))
    record(tmp_path, attempt("train", 1.0, 20.0, 3.0))  # then killed
    record(tmp_path, attempt("export", 30.0, 4.0))
    record(tmp_path, attempt("train", 40.0, 5.0, 1.5))
    assert {each.stage: each for each in costs(tmp_path)} == {
        "train": StageCost(stage="train", seconds=25.0, peak_gib=3.0),
        "export": StageCost(stage="export", seconds=4.0, peak_gib=1.0),
    }


def test_a_stage_that_is_made_again_at_each_call_counts_once(tmp_path):
    for started in (1.0, 2.0, 3.0):
        record(tmp_path, attempt("report", started, 2.0), replace_earlier=True)
    assert costs(tmp_path) == [StageCost(stage="report", seconds=2.0, peak_gib=1.0)]


def test_no_log_is_no_cost_and_a_broken_one_is_said(tmp_path):
    assert costs(tmp_path) == []
    (tmp_path / FILE).write_text('{"stage": "train"}\n')
    with pytest.raises(BadInput, match=r"stages\.jsonl:1"):
        costs(tmp_path)
