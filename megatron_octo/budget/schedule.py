"""Learning rate and weight decay as pure functions of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from megatron_octo.config.schedule import ConstantRate, RateConfig, Shape, WSDRate

if TYPE_CHECKING:
    from megatron_octo.config.train import OptimizerConfig

# How much of the way from floor to peak is left, from the share of the decay that is. So written, none subtracts
# nearly equal numbers near the end: cosine is (1 + cos(pi progress)) / 2, minus_sqrt is 1 - sqrt(progress).
SHAPES: Mapping[Shape, Callable[[float], float]] = {
    "cosine": lambda left: math.sin(math.pi * left / 2) ** 2,
    "linear": lambda left: left,
    "minus_sqrt": lambda left: left / (1 + math.sqrt(1 - left)),
}


def rate_at(config: RateConfig, tokens: int, train_tokens: int) -> float:
    """The value after `tokens` of a stage of `train_tokens`.

    A step runs at the rate of the tokens consumed before it, so the first step after the warm-up, and a decay's
    first step, run at exactly `peak`.
    """
    if tokens < config.warmup_tokens:
        return config.peak * tokens / config.warmup_tokens
    if isinstance(config, ConstantRate):
        return config.peak
    if isinstance(config, WSDRate):
        shape, decay_tokens = config.shape, config.decay_tokens
    else:
        shape, decay_tokens = config.kind, train_tokens - config.warmup_tokens
    left_tokens = max(0, train_tokens - tokens)
    if left_tokens >= decay_tokens:
        return config.peak
    return config.floor + (config.peak - config.floor) * SHAPES[shape](left_tokens / decay_tokens)


def weight_decay_at(config: OptimizerConfig, tokens: int, train_tokens: int) -> float:
    """The weight decay after `tokens` of a stage of `train_tokens`."""
    curve = config.weight_decay_over_tokens
    return config.weight_decay if curve is None else rate_at(curve, tokens, train_tokens)
