"""Learning rate and weight decay as functions of tokens. `budget/schedule.py` evaluates these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_octo.config.base import Settings, require, require_positive

Shape = Literal["cosine", "linear", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rate(Settings):
    peak: float
    """Value after the warm-up."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up from 0; the paper uses none."""

    def __post_init__(self) -> None:
        require(self.peak > 0, f"peak {self.peak:g} is not above 0", fix="the paper's 3B recipe has the rate 2e-5")
        require(self.warmup_tokens >= 0, f"warmup_tokens {self.warmup_tokens:,} is below 0", fix="0 is no warm-up")

    @property
    def fewest_tokens(self) -> int:
        """A stage of fewer tokens has no room for it."""
        return self.warmup_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class _Falling(_Rate):
    floor: float
    """Value at the end of the budget; the paper: a tenth of the peak."""

    def __post_init__(self) -> None:
        _Rate.__post_init__(self)
        require(
            0 <= self.floor <= self.peak,
            f"floor {self.floor:g} is not between 0 and the peak {self.peak:g}",
            fix="the paper's floor is a tenth of the peak",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantRate(_Rate):
    """Stable stage: one value to the end."""

    kind: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineRate(_Falling):
    """Decay stage: half a cosine from `peak`, after the warm-up, to `floor`, at the last token."""

    kind: Literal["cosine"] = "cosine"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRate(_Falling):
    """Decay stage: a straight line from `peak` to `floor`."""

    kind: Literal["linear"] = "linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class MinusSqrtRate(_Falling):
    """Decay stage: 1 - sqrt(progress), steep at first (arXiv 2405.18392), from `peak` to `floor`."""

    kind: Literal["minus_sqrt"] = "minus_sqrt"


@dataclass(frozen=True, kw_only=True, slots=True)
class WSDRate(_Falling):
    """Stable and decay in one stage: warm-up, `peak`, and to `floor` over the last `decay_tokens`."""

    kind: Literal["wsd"] = "wsd"
    decay_tokens: int
    """Tokens of the decay, the last of the budget."""
    shape: Shape = "minus_sqrt"
    """How the decay falls."""

    def __post_init__(self) -> None:
        _Falling.__post_init__(self)
        require_positive(self, "", "decay_tokens")

    @property
    def fewest_tokens(self) -> int:
        """A stage of fewer tokens has no room for it."""
        return self.warmup_tokens + self.decay_tokens


RateConfig = ConstantRate | CosineRate | LinearRate | MinusSqrtRate | WSDRate
