"""What a step leaves in metrics.jsonl and on the screen."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.budget.watch import Finding, WatchState
from megatron_octo.errors import OctoError
from megatron_octo.model.flops import train_flops_per_token
from megatron_octo.train import metrics as module
from megatron_octo.train.metrics import Metrics
from megatron_octo.train.step import LEFT_OUT, StepResult
from tests.prepared import BATCH, MODEL, SEQ_LENGTH, stage

PEAK = 1e9
RESULT = StepResult(loss=1.23456, grad_norm=0.874, seconds=0.5, watch=WatchState())


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """A function that opens the metrics of a run of 1,000 steps on two GPUs, logged every 5 steps."""
    monkeypatch.setattr(module, "_gpu_peak", lambda: PEAK)
    monkeypatch.setattr(module, "_has_gpu", lambda: True)
    monkeypatch.setattr(module, "peak_memory_gib", lambda: 61.3)
    caplog.set_level("INFO")

    def build(*, step: int = 0, **changes: Any) -> Metrics:
        config = replace(stage(tmp_path, "run", steps=1000), **changes)
        return Metrics(tmp_path, config, config.resolve(2), step=step, time_s=0.0)

    return build


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_line_for_people(opened, caplog):
    metrics = opened()
    for step in range(1, 6):
        metrics.record(
            step, RESULT, 2e-5, {"web": 2.5, "short": 1.25} if step == 5 else {}, {"optim/weight_decay": 0.1}
        )
    mfu = BATCH * SEQ_LENGTH / 0.5 * train_flops_per_token(MODEL, SEQ_LENGTH) / 2 / PEAK
    assert caplog.messages[-2:] == [
        "step 5/1,000  0.5%  loss 1.2346  lr 2.00e-05  grad 0.87  0.3k tok/s/gpu  "
        f"mfu {100 * mfu:.1f}%  61.3 GiB  eta 8m18s",
        "step 5  held-out loss  web 2.5000  short 1.2500",
    ]


def test_the_line_of_a_step_that_is_left_out_says_so(opened, caplog):
    left_out = replace(RESULT, loss=math.nan, grad_norm=math.nan, seconds=0.0, finding=LEFT_OUT)
    opened().record(5, left_out, 2e-5, {}, {})
    assert caplog.messages[-1] == "step 5/1,000  0.5%  left out  61.3 GiB"


def test_the_start_says_how_mfu_is_computed(opened, caplog):
    opened()
    assert "mfu = tokens/s/gpu x FLOP a token / 1e+09 FLOP/s, the GPU's dense bf16 peak" in caplog.text
    assert f"{train_flops_per_token(MODEL, SEQ_LENGTH):.4g} FLOP a token" in caplog.text


def test_a_row_of_metrics(opened, tmp_path):
    metrics = opened()
    metrics.record(1, RESULT, 2e-5, {"web": 2.5}, {"optim/weight_decay": 0.1})
    metrics.close()
    (row,) = _rows(tmp_path)
    assert row.pop("time_s") >= 0
    assert row.pop("throughput/mfu") == pytest.approx(512 * train_flops_per_token(MODEL, SEQ_LENGTH) / 2 / PEAK)
    assert row == {
        "step": 1,
        "tokens": BATCH * SEQ_LENGTH,
        "train/loss": 1.23456,
        "optim/lr": 2e-5,
        "optim/weight_decay": 0.1,
        "optim/grad_norm": 0.874,
        "valid/web/loss": 2.5,
        "memory/peak_gib": 61.3,
        "throughput/tokens_per_second": 512.0,
    }


def test_a_skipped_step_is_listed_and_numbers_that_json_lacks_are_left_out(opened, tmp_path, caplog):
    metrics = opened()
    finding = Finding(what="the loss is nan", action="skip")
    metrics.record(
        1,
        replace(RESULT, loss=math.nan, finding=finding, note="the loss is nan, and so on"),
        2e-5,
        {},
        {"optim/weight_decay": 0.1},
    )
    metrics.record(2, replace(RESULT, finding=replace(finding, action="log")), 2e-5, {}, {"optim/weight_decay": 0.1})
    metrics.close()
    skipped, logged = _rows(tmp_path)
    assert skipped["watch/skipped"] == 1
    assert "train/loss" not in skipped
    assert "watch/skipped" not in logged
    assert "step 1: the loss is nan, and so on" in caplog.text


def test_a_roll_back_drops_what_came_after_and_goes_on(opened, tmp_path):
    metrics = opened()
    for step in (1, 2, 3):
        metrics.record(step, RESULT, 2e-5, {}, {"optim/weight_decay": 0.1})
    metrics.go_back(1)
    metrics.record(2, replace(RESULT, loss=9.0), 2e-5, {}, {"optim/weight_decay": 0.1})
    metrics.finish()
    assert [(row["step"], row["train/loss"]) for row in _rows(tmp_path)] == [(1, 1.23456), (2, 9.0)]


@pytest.mark.parametrize("how", ["a log line", "a save", "a full buffer"])
def test_a_full_disk_is_told_with_the_path_and_the_fix(opened, tmp_path, monkeypatch, how):
    metrics = opened()
    full = Path("/dev/full").open("a", 1 if how == "a full buffer" else -1)  # noqa: SIM115
    monkeypatch.setattr(metrics, "_file", full)
    with pytest.raises(OctoError, match=rf"{tmp_path}/metrics.jsonl was not written: .*No space left(?s:.*)fix: "):
        metrics.record(5 if how == "a log line" else 1, RESULT, 2e-5, {}, {})
        if how == "a save":
            metrics.flush()
    with contextlib.suppress(OSError):
        full.close()


def test_wandb_that_fails_to_start_is_a_warning_without_its_words(opened, tmp_path, monkeypatch, caplog):
    def init(**options: Any) -> None:
        raise RuntimeError("the key is 1234")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    metrics = opened(wandb_project="project")
    metrics.record(1, RESULT, 2e-5, {}, {"optim/weight_decay": 0.1})
    metrics.finish()
    assert "no numbers go to W&B: RuntimeError" in caplog.text
    assert "1234" not in caplog.text
    assert len(_rows(tmp_path)) == 1
