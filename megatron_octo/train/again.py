"""A step that looks wrong is computed once more, by megatron's rerun state machine, from the same random states.

A fault that is gone then was the hardware's; one that comes back lies in the data or in the weights (or in hardware
that errs each time alike: only another machine can tell).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_octo.budget.watch import Finding, gravity

Numbers = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The numbers that count, and what is wrong with them."""

    numbers: Numbers
    """Loss and gradient norm."""
    finding: Finding | None
    note: str
    """The same for people, with what a second computation showed."""


class RunAgain:
    """Computes steps. One per process."""

    def __init__(self) -> None:
        from megatron.core import tensor_parallel
        from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

        tracker = tensor_parallel.get_cuda_rng_tracker()
        self._machine = RerunStateMachine(
            state_save_func=lambda: {"tracker": tracker.get_states()},
            state_restore_func=lambda saved: tracker.set_states(saved["tracker"]),
            mode=RerunMode.VALIDATE_RESULTS,
        )
        self._machine.should_checkpoint_and_exit()  # before this call it takes every result for good

    def compute(self, step: Callable[[], Numbers], judge: Callable[[Numbers], Finding | None]) -> Judged:
        """The step's numbers; computed twice if what `judge` finds asks for more than a line. All ranks call it."""
        results: list[Judged] = []
        while self._machine.should_run_forward_backward(None):
            numbers = step()
            finding = judge(numbers)
            results.append(Judged(numbers=numbers, finding=finding, note=finding.what if finding else ""))
            self._machine.validate_result(
                results[-1].finding,
                rejection_func=lambda finding: gravity(finding) > 0,
                comparison_func=lambda *_: 0.0,  # what it says of two results, `_second` says
                message="step",
                fatal=False,
            )
        return _second(*results) if len(results) > 1 else results[0]


def _second(first: Judged, second: Judged) -> Judged:
    """The second result with what it shows, as all ranks agree: on failing hardware they may not see the same."""
    import torch.distributed as dist

    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (first.finding, second.finding))
    before, after = (max(findings, key=gravity) for findings in zip(*seen, strict=True))
    if gravity(after) == 0:
        note = f"{before.what}, but not when computed again, which counts: a passing fault, most likely of hardware"
    else:
        note = f"{after.what}, and so it is when computed again: no passing fault of the hardware"
    return replace(second, finding=after, note=note)
