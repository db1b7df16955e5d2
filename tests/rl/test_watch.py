"""The watch over rows made by hand: each fault is found, and what goes well raises no alarm."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_octo.config.rl import RLWatchConfig
from megatron_octo.errors import SettingsError
from megatron_octo.rl.collect import Row
from megatron_octo.rl.watch import Finding, judge

CONFIG = RLWatchConfig()


def rows(**courses: Sequence[float]) -> list[Row]:
    """Steps of a run with these curves; the others are quiet."""
    (length,) = {len(course) for course in courses.values()}
    quiet = {
        "rl/reward_mean": 0.0,
        "rl/policy_loss": 0.0,
        "rl/vllm_kl": 1e-4,
        "optim/grad_norm": 0.3,
        "rl/accuracy": 0.5,
        "rl/truncated_share": 0.05,
        "rl/repetition_share": 0.05,
    }
    return [
        {"step": step + 1, **quiet, **{name.replace("_", "/", 1): course[step] for name, course in courses.items()}}
        for step in range(length)
    ]


def first(run: Sequence[Row], config: RLWatchConfig = CONFIG, *, cuda: bool = False) -> Finding | None:
    """The first finding as the run goes on, step by step."""
    found = (judge(config, run[: end + 1], roll_backs=0, cuda=cuda) for end in range(len(run)))
    return next((finding for finding in found if finding), None)


def line(start: float, end: float, steps: int) -> list[float]:
    """A curve that goes straight from `start` to `end`."""
    return [start + (end - start) * step / max(1, steps - 1) for step in range(steps)]


def test_a_collapse_is_found_and_began_where_the_score_began_to_fall() -> None:
    score = [*line(0.2, 0.476, 30), *line(0.45, 0.05, 8), *[0.05] * 10]
    cut_off = [*[0.05] * 30, *line(0.1, 0.9, 8), *[0.95] * 10]
    finding = first(rows(rl_accuracy=score, rl_truncated_share=cut_off))
    assert finding is not None and finding.action == "stop"
    assert "right answers fell from 45.9% to" in finding.what and "cut off" in finding.what
    assert 37 <= finding.step <= 41
    assert 31 <= finding.since <= 36, "a save from before the fall is a good one"


def test_a_score_that_falls_with_short_responses_is_no_collapse() -> None:
    assert first(rows(rl_accuracy=line(0.6, 0.1, 40))) is None


def test_responses_that_are_cut_off_while_the_score_rises_are_no_collapse() -> None:
    assert first(rows(rl_accuracy=line(0.05, 0.4, 60), rl_truncated_share=line(0.9, 0.6, 60))) is None


def test_a_score_near_zero_cannot_collapse() -> None:
    noise = random.Random(0)
    score = [noise.choice((0.0, 0.02, 0.04)) for _ in range(200)]
    assert first(rows(rl_accuracy=score, rl_truncated_share=[0.9] * 200)) is None


def test_a_dip_of_one_step_is_no_collapse() -> None:
    score = [*[0.5] * 20, 0.0, *[0.5] * 20]
    assert first(rows(rl_accuracy=score, rl_truncated_share=[0.6] * 41)) is None


def test_stale_weights_are_found_at_the_first_step_beyond_the_bound() -> None:
    kl = [1e-4, -2e-4, 3e-4, 0.02, 0.09]
    finding = first(rows(rl_vllm_kl=kl))
    assert finding is not None and (finding.step, finding.since) == (4, 4)
    assert "vllm_kl is 0.02, not within 0.001" in finding.what
    mirrored = first(rows(rl_vllm_kl=[-value for value in kl]))
    assert mirrored is not None and mirrored.step == 4


def test_a_vllm_kl_that_rises_is_found_before_it_is_beyond_the_bound() -> None:
    run = rows(rl_vllm_kl=[*[-5e-5] * 10, *line(-1e-4, -9e-4, 10)])
    finding = first(run)
    assert finding is not None and (finding.action, finding.step) == ("stop", 18)
    assert "|vllm_kl| rose from 5e-05 to 0.000" in finding.what
    assert 11 < finding.since <= 14, "a save from before the rise is a good one"
    assert first(run, replace(CONFIG, vllm_kl_rise=20)) is None
    assert first(rows(rl_vllm_kl=[*[1e-5] * 10, *line(1e-5, 4e-4, 10)])) is None, "far below the bound it is noise"
    assert first(run, cuda=True) is None


def test_a_gpu_has_a_wider_bound_and_a_setting_goes_before_both() -> None:
    run = rows(rl_vllm_kl=[0.01, 0.05])
    found = first(run, cuda=True)
    assert found is not None and found.step == 2
    assert first(run, replace(CONFIG, most_vllm_kl=0.1)) is None


def test_repetition_that_explodes_is_found_and_one_that_was_there_is_not() -> None:
    finding = first(rows(rl_repetition_share=[*[0.1] * 10, *line(0.2, 0.9, 8), *[0.9] * 4]))
    assert finding is not None and "repeated share of responses rose from 10.0% to" in finding.what
    assert 11 <= finding.since <= 16
    assert first(rows(rl_repetition_share=[0.8] * 30)) is None, "a base model may begin like this"
    assert first(rows(rl_repetition_share=line(0.9, 0.1, 30))) is None


def test_a_grading_that_breaks_on_most_responses_for_a_window_is_found() -> None:
    finding = first(rows(rl_reward_error_share=[0.0, 0.3, *[0.51] * 4, 0.9, 0.9]))
    assert finding is not None and (finding.action, finding.step, finding.since) == ("stop", 7, 3)
    assert finding.what == "the grading broke on at least 51.0% of the responses in each of 5 steps"


@pytest.mark.parametrize(
    "shares",
    [[0.5] * 20, [*[1.0] * 4, 0.25] * 4, [0.0] * 20, [1.0] * 4],
    ids=["half", "now and then", "none", "not yet for a window"],
)
def test_a_few_rewards_that_fail_are_no_finding(shares: list[float]) -> None:
    assert first(rows(rl_reward_error_share=shares)) is None


@pytest.mark.parametrize("name", ["rl/reward_mean", "rl/policy_loss", "rl/vllm_kl", "optim/grad_norm"])
def test_a_number_that_is_none_is_found_at_once(name: str) -> None:
    run = rows(rl_accuracy=[0.5, 0.5])
    del run[-1][name]
    finding = first(run)
    assert finding is not None and finding.step == finding.since == 2
    assert finding.what == f"{name}: no finite number"


def test_a_healthy_run_raises_no_alarm_over_many_noisy_runs() -> None:
    for seed in range(50):
        noise = random.Random(seed)
        score = [min(1.0, max(0.0, 0.5 - 0.45 * math.exp(-step / 40) + noise.gauss(0, 0.05))) for step in range(200)]
        cut_off = [min(1.0, max(0.0, 0.6 * math.exp(-step / 60) + noise.gauss(0, 0.05))) for step in range(200)]
        repetition = [min(1.0, max(0.0, 0.3 * math.exp(-step / 60) + noise.gauss(0, 0.05))) for step in range(200)]
        kl = [noise.gauss(0, 1e-4) for _ in range(200)]
        courses = {"rl_accuracy": score, "rl_truncated_share": cut_off, "rl_repetition_share": repetition}
        assert first(rows(**courses, rl_vllm_kl=kl)) is None, seed


def test_longer_responses_at_a_border_raise_no_alarm() -> None:
    score = [*line(0.2, 0.4, 100), *line(0.36, 0.42, 60)]
    cut_off = [*line(0.3, 0.5, 100), *line(0.1, 0.4, 60)]
    assert first(rows(rl_accuracy=score, rl_truncated_share=cut_off)) is None


def test_of_several_findings_the_gravest_counts() -> None:
    run = rows(rl_vllm_kl=[0.5], rl_reward_mean=[0.0])
    del run[0]["rl/policy_loss"]
    config = replace(CONFIG, on_stale_weights="roll_back", on_non_finite="log")
    finding = judge(config, run, roll_backs=0, cuda=False)
    assert finding is not None and finding.action == "roll_back" and "vllm_kl" in finding.what
    finding = judge(replace(config, on_non_finite="stop"), run, roll_backs=0, cuda=False)
    assert finding is not None and finding.action == "stop" and "policy_loss" in finding.what


def test_after_the_last_roll_back_comes_the_stop() -> None:
    config = replace(CONFIG, on_stale_weights="roll_back", most_roll_backs=2)
    actions = [judge(config, rows(rl_vllm_kl=[0.5]), roll_backs=done, cuda=False) for done in (0, 1, 2)]
    assert [finding.action for finding in actions if finding] == ["roll_back", "roll_back", "stop"]


def test_rows_without_optional_numbers_are_judged_by_the_others() -> None:
    run = [
        {name: value for name, value in row.items() if "repetition" not in name} for row in rows(rl_accuracy=[0.5] * 20)
    ]
    assert first(run) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window_steps", 0),
        ("score_fall", 0.0),
        ("truncated_share", 1.5),
        ("reward_error_share", 1.5),
        ("most_vllm_kl", -1.0),
        ("most_roll_backs", -1),
        ("vllm_kl_rise", 1.0),
    ],
)
def test_a_watch_that_means_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(SettingsError, match=rf"watch\.{field}"):
        replace(CONFIG, **{field: value})
