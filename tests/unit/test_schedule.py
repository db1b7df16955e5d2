"""The learning rate and the weight decay are pure functions of tokens, exact at every step of the full recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mpmath
import pytest

from megatron_octo.budget.schedule import rate_at, weight_decay_at
from megatron_octo.config.schedule import (
    ConstantRate,
    CosineRate,
    LinearRate,
    MinusSqrtRate,
    RateConfig,
    Shape,
    WSDRate,
)
from megatron_octo.config.train import OptimizerConfig
from megatron_octo.errors import BadInput

BATCH = 512 * 8192
STABLE_STEPS, DECAY_STEPS = 50_000, 5_000
TRAIN = DECAY_STEPS * BATCH
STABLE = ConstantRate(peak=2e-5)
DECAY = CosineRate(peak=2e-5, floor=2e-6)
TOLERANCE = 1e-12

Number = mpmath.mpf
CLOSED: dict[Shape, Callable[[Number], Number]] = {
    "cosine": lambda progress: (1 + mpmath.cos(mpmath.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "minus_sqrt": lambda progress: 1 - mpmath.sqrt(progress),
}


def closed(shape: Shape, progress: Number, *, peak: float, floor: float) -> Number:
    """The value at a share of the decay, in 40 digits."""
    return floor + (mpmath.mpf(peak) - mpmath.mpf(floor)) * CLOSED[shape](progress)


def assert_exact(got: float, expected: Number) -> None:
    """They agree to 1e-12 of `expected`."""
    assert abs(got - expected) <= TOLERANCE * expected


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(40):
        yield


@pytest.mark.parametrize("floor", [2e-6, 0.0])
@pytest.mark.parametrize("kind", [CosineRate, LinearRate, MinusSqrtRate])
def test_a_decay_is_its_closed_form_at_every_step_of_the_full_recipe(kind, floor):
    rate = kind(peak=2e-5, floor=floor)
    for step in range(DECAY_STEPS):
        expected = closed(rate.kind, mpmath.mpf(step) / DECAY_STEPS, peak=2e-5, floor=floor)
        assert_exact(rate_at(rate, step * BATCH, TRAIN), expected)


@pytest.mark.parametrize("kind", [CosineRate, LinearRate, MinusSqrtRate])
def test_a_long_decay_to_nothing_is_exact_to_its_last_step(kind):
    rate, steps = kind(peak=2e-5, floor=0.0), 1_000_000
    for step in range(steps - 1000, steps):
        assert_exact(
            rate_at(rate, step * BATCH, steps * BATCH),
            closed(rate.kind, mpmath.mpf(step) / steps, peak=2e-5, floor=0.0),
        )


@pytest.mark.parametrize("shape", CLOSED)
def test_wsd_is_warm_up_then_the_peak_then_the_shape(shape):
    train, warmup, decay = (STABLE_STEPS + DECAY_STEPS) * BATCH, 2_000 * BATCH, TRAIN
    rate = WSDRate(peak=2e-5, floor=2e-7, warmup_tokens=warmup, decay_tokens=decay, shape=shape)
    for step in range(STABLE_STEPS + DECAY_STEPS):
        got = rate_at(rate, step * BATCH, train)
        if step < 2_000:
            assert_exact(got, mpmath.mpf(2e-5) * step / 2_000)
        elif step <= STABLE_STEPS:
            assert got == 2e-5
        else:
            progress = mpmath.mpf(step - STABLE_STEPS) / DECAY_STEPS
            assert_exact(got, closed(shape, progress, peak=2e-5, floor=2e-7))


def test_the_stable_stage_keeps_one_rate():
    train = STABLE_STEPS * BATCH
    assert {rate_at(STABLE, step * BATCH, train) for step in range(STABLE_STEPS + 1)} == {2e-5}


@pytest.mark.parametrize("decay", [DECAY, LinearRate(peak=2e-5, floor=0.0), MinusSqrtRate(peak=2e-5, floor=0.0)])
def test_decay_starts_at_exactly_the_rate_that_stable_ended_with(decay):
    assert rate_at(decay, 0, TRAIN) == rate_at(STABLE, TRAIN, TRAIN)


@pytest.mark.parametrize("kind", [CosineRate, LinearRate, MinusSqrtRate])
def test_decay_ends_at_exactly_its_floor_and_stays_there(kind):
    rate = kind(peak=2e-5, floor=2e-6)
    assert rate_at(rate, TRAIN, TRAIN) == rate_at(rate, TRAIN + 1, TRAIN) == 2e-6


@pytest.mark.parametrize("kind", [CosineRate, LinearRate, MinusSqrtRate])
def test_decay_never_rises(kind):
    rates = [rate_at(kind(peak=2e-5, floor=2e-6), step * BATCH, TRAIN) for step in range(DECAY_STEPS + 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_warm_up_is_linear_from_zero_and_ends_at_the_peak():
    rate = ConstantRate(peak=1e-3, warmup_tokens=1000)
    assert [rate_at(rate, tokens, 10_000) for tokens in (0, 250, 1000)] == [0.0, pytest.approx(2.5e-4, rel=1e-12), 1e-3]


def test_a_decay_after_a_warm_up_spans_the_rest():
    rate = CosineRate(peak=1.0, floor=0.0, warmup_tokens=100)
    assert rate_at(rate, 100, 300) == 1.0
    assert_exact(rate_at(rate, 200, 300), mpmath.mpf("0.5"))


def test_weight_decay_is_a_number_or_a_curve():
    assert weight_decay_at(OptimizerConfig(weight_decay=0.2), TRAIN // 2, TRAIN) == 0.2
    curve: RateConfig = LinearRate(peak=0.1, floor=0.0)
    for step in range(DECAY_STEPS):
        got = weight_decay_at(OptimizerConfig(weight_decay_over_tokens=curve), step * BATCH, TRAIN)
        assert_exact(got, closed("linear", mpmath.mpf(step) / DECAY_STEPS, peak=0.1, floor=0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantRate(peak=0.0), "peak 0 is not above 0"),
        (lambda: CosineRate(peak=1e-5, floor=2e-5), "floor 2e-05 is not between 0 and the peak 1e-05"),
        (lambda: LinearRate(peak=1e-5, floor=0.0, warmup_tokens=-1), "warmup_tokens -1 is below 0"),
        (lambda: WSDRate(peak=1e-5, floor=0.0, decay_tokens=0), "decay_tokens 0 is not above 0"),
    ],
)
def test_what_no_curve_can_be_is_refused(make, message):
    with pytest.raises(BadInput, match=message):
        make()
