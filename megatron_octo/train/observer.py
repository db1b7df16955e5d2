"""All that looks at a stage while it trains and changes nothing of it: numbers, validation, slow ranks, marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_octo.train.marks import Marks
    from megatron_octo.train.metrics import Metrics
    from megatron_octo.train.step import StepResult
    from megatron_octo.train.straggler import Straggler
    from megatron_octo.train.validate import Validation


@dataclass(frozen=True, kw_only=True, slots=True)
class Observer:
    """What the loop tells of its steps and saves. All ranks have one and call it together."""

    metrics: Metrics | None
    """Rank 0's."""
    validation: Validation
    straggler: Straggler
    marks: Marks | None
    """Rank 0's."""
    alive: Callable[[], None]
    """The watchdog's."""

    def step_begins(self) -> None:
        """The loop is about to train."""
        self.alive()
        self.straggler.start()

    def step_ended(self, step: int, result: StepResult, rate: float, more: Mapping[str, float]) -> None:
        """The step counts; rank 0 has `more` numbers, by name."""
        self.straggler.report(step)
        held_out = self.validation.after(step)
        self.alive()
        if self.metrics:
            self.metrics.record(step, result, rate, held_out, more)

    def rolled_back(self, step: int) -> None:
        """What came after `step` counts no longer."""
        if self.metrics:
            self.metrics.go_back(step)

    def save_begins(self) -> float:
        """Put the numbers on disk, so that no save is ahead of them; returns rank 0's seconds of training."""
        if self.metrics is None:
            return 0.0
        self.metrics.flush()
        return self.metrics.time_s

    def saves_in_use(self) -> frozenset[int]:
        """Steps whose saves something reads, on rank 0."""
        return frozenset(self.marks.in_use) if self.marks else frozenset()

    def saved(self) -> None:
        """Saves are there, of this attempt or of earlier ones."""
        if self.marks:
            self.marks.start()

    def finished(self, *, stopped: bool) -> None:
        """The last step counts and is saved; `stopped` if not at the stage's end, but because someone asked."""
        if self.metrics:
            self.metrics.finish()
        if stopped and self.marks:
            self.marks.leave()
