"""Intervals over problems."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_octo.evaluate import statistics
from megatron_octo.evaluate.statistics import accuracy_interval, paired_difference


def test_interval_of_independent_answers_equals_the_normal_approximation() -> None:
    values = np.repeat([0.0, 1.0], [240, 160])
    low, high = accuracy_interval(values.tolist())
    half = 1.96 * math.sqrt(0.4 * 0.6 / 400)
    assert low == pytest.approx(0.4 - half, abs=0.004)
    assert high == pytest.approx(0.4 + half, abs=0.004)


def test_answers_to_one_problem_do_not_count_as_independent() -> None:
    """100 problems that are all right or all wrong tell no more with 4 answers each than with one."""
    all_or_nothing = np.repeat([0.0, 1.0], [50, 50]).tolist()
    mixed = [0.5] * 100
    low, high = accuracy_interval(all_or_nothing)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 100), abs=0.02)
    assert accuracy_interval(mixed) == (0.5, 0.5)


def test_interval_stays_between_0_and_1_and_repeats_with_its_seed() -> None:
    values = [1.0] * 29 + [0.0]
    low, high = accuracy_interval(values, seed=3)
    assert 0 <= low < high <= 1
    assert accuracy_interval(values, seed=3) == (low, high)


def test_true_mean_is_inside_the_interval_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    inside = 0
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    for seed in range(200):
        chances = draw.beta(2, 3, size=100)  # mean 0.4
        low, high = accuracy_interval((draw.binomial(4, chances) / 4).tolist(), seed=seed)
        inside += low <= 0.4 <= high
    assert 180 <= inside <= 199


def test_many_problems_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CHUNK_DRAWS", 30_000)
    values = np.random.default_rng(0).integers(0, 2, size=400).astype(float)
    low, high = accuracy_interval(values.tolist())
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.05)


def test_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    draw = np.random.default_rng(1)
    before = draw.beta(1, 1, size=400)
    after = np.clip(before + 0.1 + 0.02 * draw.standard_normal(400), 0, 1)
    difference, low, high = paired_difference(before.tolist(), after.tolist())
    assert difference == pytest.approx(float((after - before).mean()))
    assert low < difference < high
    apart = accuracy_interval(after.tolist())
    assert high - low < 0.3 * (apart[1] - apart[0])


def test_paired_difference_has_the_sign_of_after_minus_before() -> None:
    assert paired_difference([1.0, 1.0, 0.5], [0.0, 0.0, 0.5])[0] == pytest.approx(-2 / 3)


def test_difference_of_other_problems_is_refused() -> None:
    with pytest.raises(ValueError, match="same problems, not 2 and 3"):
        paired_difference([0.0, 1.0], [0.0, 1.0, 1.0])


def test_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        accuracy_interval([])
