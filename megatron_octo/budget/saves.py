"""Which steps save, and which saves stay: pure functions of steps and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_octo.config.train import SaveConfig


def is_due(config: SaveConfig, step: int, *, batch_tokens: int) -> bool:
    """Whether an interval in steps or tokens ends with `step`."""
    tokens = step * batch_tokens
    by_steps = config.every_steps and step % config.every_steps == 0
    by_tokens = config.every_tokens and tokens // config.every_tokens > (tokens - batch_tokens) // config.every_tokens
    return bool(by_steps or by_tokens)


def superseded(config: SaveConfig, steps: Sequence[int], *, batch_tokens: int) -> list[int]:
    """Which of the saves after `steps`, in order, no longer stay."""
    kept, every, passed = set(steps[-config.keep_last :]), config.keep_every_tokens, 0
    for step in steps:
        multiples = step * batch_tokens // every if every else 0
        if multiples > passed:
            kept.add(step)
            passed = multiples
    return [step for step in steps if step not in kept]
