"""What ranks ask of each other: to save, to stop. They agree because each step sums what all ranks ask for.

People ask by a signal to any rank (SIGTERM, SIGUSR1), or by a file in the run's folder (`touch runs/NAME/STOP`).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NamedTuple

from megatron_octo.platform.process import STOP_SIGNALS


class Votes(NamedTuple):
    """How many ranks ask for what at one step."""

    stop: int = 0
    """Save, and end the run after this step."""
    save: int = 0
    """Save after this step and go on."""
    writing: int = 0
    """Wait: the rank's part of the last save is not on disk yet."""


NO_VOTES = Votes()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Within the block SIGTERM and SIGUSR1 only add themselves to the list that it yields."""
    received: list[signal.Signals] = []
    previous = {
        each: signal.signal(each, lambda number, frame: received.append(signal.Signals(number)))
        for each in STOP_SIGNALS
    }
    try:
        yield received
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
