"""Does a step look wrong, and what then: pure functions of numbers that all ranks share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, get_args

from megatron_octo.config.base import Settings
from megatron_octo.config.train import Action

if TYPE_CHECKING:
    from megatron_octo.config.train import WatchConfig

SIGMA_OF_DEVIATION = 1.4826  # a normal distribution's sigma over its median absolute deviation
LEAST_SIGMA = 1e-3  # of the median: where a window is nearly flat, its noise is no measure
ACTIONS: tuple[Action, ...] = get_args(Action)  # the mildest first


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchState(Settings):
    """What the watch knows of the steps so far; a part of every save, so that a resume judges as the run would have."""

    losses: tuple[float, ...] = ()
    """Of the last `watch.window_steps` steps; finite ones only."""
    grad_norms: tuple[float, ...] = ()
    """As `losses`."""
    skips_in_a_row: int = 0
    """Skipped steps since the last that was not."""
    roll_backs: int = 0
    """Roll backs so far."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Steps (first, last) whose batches are read, count as consumed, and change nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is wrong with a step."""

    what: str
    """The number and what it was compared with."""
    action: Action
    """What follows."""


def gravity(finding: Finding | None) -> int:
    """0 where the step's update may follow, above 0 where it must not: the more, the graver."""
    return ACTIONS.index(finding.action) if finding else 0


def judge(config: WatchConfig, state: WatchState, loss: float, grad_norm: float) -> Finding | None:
    """What is wrong with a step of this loss and gradient norm, None if nothing is; of several, the gravest."""
    gravest = max(_findings(config, state, loss, grad_norm), key=gravity, default=None)
    return _limited(config, state, gravest) if gravest else None


def remember(
    config: WatchConfig, state: WatchState, step: int, loss: float, grad_norm: float, *, skipped: bool
) -> WatchState:
    """The state after a step that was computed."""
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    last = slice(-config.window_steps, None)
    return replace(
        state,
        losses=(*state.losses, loss)[last] if finite else state.losses,
        grad_norms=(*state.grad_norms, grad_norm)[last] if finite else state.grad_norms,
        skips_in_a_row=state.skips_in_a_row + 1 if skipped else 0,
        left_out=(*state.left_out, (step, step)) if skipped else state.left_out,
    )


def rolled_back(config: WatchConfig, now: WatchState, saved: WatchState, *, step: int, saved_step: int) -> WatchState:
    """The state to go on with from the save after `saved_step`, when `step` was at fault."""
    first = max(saved_step + 1, step - config.leave_out_steps + 1)
    return replace(saved, roll_backs=now.roll_backs + 1, left_out=(*now.left_out, (first, step)))


def is_left_out(state: WatchState, step: int) -> bool:
    """Whether the batch of `step` is not to be learned from."""
    return any(first <= step <= last for first, last in state.left_out)


def sigmas_above(value: float, window: Sequence[float]) -> float:
    """How many standard deviations `value` lies above the middle of `window`, both estimated by medians."""
    middle = median(window)
    sigma = max(SIGMA_OF_DEVIATION * median(abs(each - middle) for each in window), LEAST_SIGMA * abs(middle))
    return max(0.0, (value - middle) / sigma) if sigma > 0 else 0.0


def _findings(config: WatchConfig, state: WatchState, loss: float, grad_norm: float) -> Iterator[Finding]:
    named = (
        ("loss", loss, state.losses, config.on_loss_spike),
        ("gradient norm", grad_norm, state.grad_norms, config.on_grad_norm),
    )
    for name, value, window, action in named:
        if not math.isfinite(value):
            yield Finding(what=f"the {name} is {value}", action=config.on_non_finite)
        elif len(window) >= config.window_steps:
            sigmas = sigmas_above(value, window)
            if sigmas > config.sigmas:
                what = (
                    f"the {name} is {value:.4g}, {sigmas:.1f} sigmas above {median(window):.4g}, the median of "
                    f"{len(window)} steps"
                )
                yield Finding(what=what, action=action)


def _limited(config: WatchConfig, state: WatchState, finding: Finding) -> Finding:
    """The finding, with `stop` in place of one skip or roll back too many."""
    if finding.action == "skip" and state.skips_in_a_row >= config.most_skips_in_a_row:
        what = f"{finding.what}, after {state.skips_in_a_row} skipped steps in a row"
        return Finding(what=what, action="stop")
    if finding.action == "roll_back" and state.roll_backs >= config.most_roll_backs:
        return Finding(what=f"{finding.what}, after {state.roll_backs} roll backs", action="stop")
    return finding
