"""The learning rate is a pure function of tokens."""

from __future__ import annotations

import itertools
import math

import pytest

from megatron_octo.budget.schedule import rate_at
from megatron_octo.config.schedule import ConstantRate, CosineRate

TRAIN = 20_971_520_000
STABLE = ConstantRate(peak=2e-5)
DECAY = CosineRate(peak=2e-5, floor=2e-6)


def test_the_stable_stage_keeps_one_rate():
    assert {rate_at(STABLE, tokens, TRAIN) for tokens in (0, 1, TRAIN // 2, TRAIN - 1, TRAIN)} == {2e-5}


def test_decay_starts_at_exactly_the_rate_that_stable_ended_with():
    assert rate_at(DECAY, 0, TRAIN) == rate_at(STABLE, TRAIN, TRAIN)


@pytest.mark.parametrize("share", [0.0, 0.125, 0.25, 0.5, 0.9, 1.0])
def test_decay_follows_the_closed_form(share):
    closed = DECAY.floor + (DECAY.peak - DECAY.floor) * 0.5 * (1 + math.cos(math.pi * share))
    assert rate_at(DECAY, int(share * TRAIN), TRAIN) == pytest.approx(closed, rel=1e-12)


def test_decay_ends_at_exactly_its_floor_and_stays_there():
    assert rate_at(DECAY, TRAIN, TRAIN) == rate_at(DECAY, TRAIN + 1, TRAIN) == 2e-6


def test_decay_never_rises():
    rates = [rate_at(DECAY, tokens, TRAIN) for tokens in range(0, TRAIN + 1, TRAIN // 1000)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_warm_up_is_linear_from_zero_and_ends_at_the_peak():
    rate = ConstantRate(peak=1e-3, warmup_tokens=1000)
    assert [rate_at(rate, tokens, 10_000) for tokens in (0, 250, 1000)] == [0.0, pytest.approx(2.5e-4, rel=1e-12), 1e-3]


def test_a_cosine_after_a_warm_up_spans_the_rest():
    rate = CosineRate(peak=1.0, floor=0.0, warmup_tokens=100)
    assert rate_at(rate, 100, 300) == 1.0
    assert rate_at(rate, 200, 300) == pytest.approx(0.5, rel=1e-12)
