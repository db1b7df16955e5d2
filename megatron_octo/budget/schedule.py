"""Learning rate as a pure function of tokens."""

from __future__ import annotations

import math

from megatron_octo.config.schedule import ConstantRate, RateConfig


def rate_at(config: RateConfig, tokens: int, train_tokens: int) -> float:
    """The rate after `tokens` of a stage of `train_tokens`.

    A step runs at the rate of the tokens consumed before it, so the first step after the warm-up, and a decay's
    first step, run at exactly `peak`.
    """
    if tokens < config.warmup_tokens:
        return config.peak * tokens / config.warmup_tokens
    if isinstance(config, ConstantRate):
        return config.peak
    if tokens >= train_tokens:
        return config.floor
    progress = (tokens - config.warmup_tokens) / (train_tokens - config.warmup_tokens)
    return config.peak - (config.peak - config.floor) * (1 - math.cos(math.pi * progress)) / 2
