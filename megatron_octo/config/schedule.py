"""Learning rate as a function of tokens. `budget/schedule.py` evaluates these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_octo.config.base import Settings, require


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantRate(Settings):
    """Stable stage: one rate to the end."""

    kind: Literal["constant"] = "constant"
    peak: float
    """Learning rate after the warm-up."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up from 0; the paper uses none."""

    def __post_init__(self) -> None:
        _check_peak(self.peak)


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineRate(Settings):
    """Decay stage: half a cosine from `peak`, at the first token, to `floor`, at the last."""

    kind: Literal["cosine"] = "cosine"
    peak: float
    """Learning rate at the start; equals the stable stage's, so that the border is continuous."""
    floor: float
    """Learning rate at the end of the budget; the paper: a tenth of the peak."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up from 0; the paper uses none."""

    def __post_init__(self) -> None:
        _check_peak(self.peak)
        require(
            0 <= self.floor <= self.peak,
            f"learning_rate.floor {self.floor:g} is not between 0 and the peak {self.peak:g}",
            fix="the paper's floor is a tenth of the peak",
        )


RateConfig = ConstantRate | CosineRate


def _check_peak(peak: float) -> None:
    require(peak > 0, f"learning_rate.peak {peak:g} is not above 0", fix="the paper's 3B recipe uses 2e-5")
