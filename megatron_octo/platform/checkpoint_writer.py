"""Keeps megatron's checkpoint writer inside the training process.

Its results queue belongs to a process that it spawns, which imports torch again, on every rank. Saves here are
synchronous and written by threads, so a queue of this process serves them.
"""

from __future__ import annotations

import queue


def install() -> None:
    """Use a queue of this process. A second call changes nothing."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
