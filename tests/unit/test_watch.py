"""Which steps look wrong, and what follows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_octo.budget.watch import WatchState, is_left_out, judge, remember, rolled_back, sigmas_above
from megatron_octo.config.base import from_dict, to_dict
from megatron_octo.config.train import WatchConfig
from megatron_octo.errors import SettingsError

CONFIG = WatchConfig(window_steps=8, on_loss_spike="skip", on_grad_norm="roll_back")
QUIET = (1.00, 1.02, 0.98, 1.01, 0.99, 1.03, 0.97, 1.00)  # its robust sigma is 1.4826 x 0.015
STATE = WatchState(losses=QUIET, grad_norms=QUIET)


def test_a_normal_step_is_not_remarked():
    assert judge(CONFIG, STATE, 1.05, 1.05) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_found_from_the_first_step_on(loss, norm):
    finding = judge(CONFIG, WatchState(), loss, norm)
    assert finding is not None
    assert finding.action == "stop"


@pytest.mark.parametrize(("distance", "found"), [(5.9, False), (6.1, True), (-50.0, False)])
def test_a_spike_lies_six_robust_sigmas_above_the_median(distance, found):
    finding = judge(CONFIG, STATE, 1.0 + distance * 1.4826 * 0.015, 1.0)
    assert (finding is not None) == found
    if finding:
        assert finding.action == "skip"
        assert "6.1 sigmas above 1, the median of 8 steps" in finding.what


def test_no_step_is_judged_before_the_window_is_full():
    assert judge(CONFIG, replace(STATE, losses=QUIET[1:]), 100.0, 1.0) is None


def test_of_two_findings_the_graver_counts():
    finding = judge(CONFIG, STATE, 2.0, 2.0)
    assert finding is not None
    assert finding.action == "roll_back"
    assert "gradient norm" in finding.what


def test_a_spike_in_the_window_hides_no_other():
    assert judge(CONFIG, replace(STATE, losses=(*QUIET[:-1], 50.0)), 2.0, 1.0) is not None


def test_a_flat_window_takes_a_thousandth_of_its_median_for_noise():
    assert sigmas_above(1.005, [1.0] * 8) == pytest.approx(5.0)
    assert sigmas_above(3.0, [0.0] * 8) == 0.0


def test_one_skip_too_many_in_a_row_stops():
    config = replace(CONFIG, most_skips_in_a_row=2)
    state = STATE
    for step in (1, 2):
        finding = judge(config, state, 2.0, 1.0)
        assert finding is not None
        assert finding.action == "skip"
        state = remember(config, state, step, 2.0, 1.0, skipped=True)
    assert judge(config, state, 2.0, 1.0).action == "stop"  # type: ignore[union-attr]
    state = remember(config, state, 3, 1.0, 1.0, skipped=False)
    assert judge(config, state, 2.0, 1.0).action == "skip"  # type: ignore[union-attr]


def test_one_roll_back_too_many_stops():
    config = replace(CONFIG, most_roll_backs=1)
    assert judge(config, STATE, 1.0, 2.0).action == "roll_back"  # type: ignore[union-attr]
    finding = judge(config, replace(STATE, roll_backs=1), 1.0, 2.0)
    assert finding is not None
    assert finding.action == "stop"
    assert "after 1 roll backs" in finding.what


def test_the_window_holds_the_last_finite_steps_and_skips_are_listed():
    state = remember(CONFIG, STATE, 9, 7.0, 8.0, skipped=False)
    assert state.losses == (*QUIET[1:], 7.0)
    assert state.grad_norms == (*QUIET[1:], 8.0)
    after = remember(CONFIG, state, 10, math.nan, 1.0, skipped=True)
    assert (after.losses, after.grad_norms) == (state.losses, state.grad_norms)
    assert after.left_out == ((10, 10),)
    assert [step for step in range(8, 13) if is_left_out(after, step)] == [10]


@pytest.mark.parametrize(("leave_out", "first"), [(1, 20), (3, 18), (64, 11)])
def test_a_roll_back_leaves_out_the_last_batches_after_the_save(leave_out, first):
    saved = WatchState(losses=(1.0,))
    now = replace(STATE, left_out=((15, 15),), roll_backs=1)
    state = rolled_back(replace(CONFIG, leave_out_steps=leave_out), now, saved, step=20, saved_step=10)
    assert state == WatchState(losses=(1.0,), roll_backs=2, left_out=((15, 15), (first, 20)))


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_the_state_survives_json_to_the_bit(values):
    state = WatchState(losses=tuple(values), left_out=((1, 2),))
    assert from_dict(WatchState, json.loads(json.dumps(to_dict(state))), origin="a test") == state


def test_numbers_that_mean_nothing_are_refused():
    for wrong in (
        {"sigmas": 0.0},
        {"window_steps": 0},
        {"hang_timeout_s": 0.0},
        {"most_roll_backs": -1},
        {"most_skips_in_a_row": -3},
    ):
        with pytest.raises(SettingsError, match="watch"):
            WatchConfig(**wrong)  # type: ignore[arg-type]
