"""Ends a job that hangs, and leaves every rank's stack in the run folder's log/."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_octo.console import logger, rank

GRACE_S = 10.0  # from the first rank's stack to the end of the job, so that all ranks write theirs
LOOK_EVERY_S = 1.0


@contextlib.contextmanager
def watchdog(run: Path, timeout_s: float | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call whenever something has ended; it must be called in time, the first time too.

    Python's own timer writes the stacks: it needs no turn of the interpreter, which may be what hangs.
    """
    if timeout_s is None:
        yield lambda: None
        return
    path = run / "log" / f"stacks_rank_{rank():05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline, over = [0.0], threading.Event()

    def alive() -> None:
        faulthandler.dump_traceback_later(timeout_s, file=file)
        deadline[0] = time.monotonic() + timeout_s + GRACE_S

    def end_when_late() -> None:
        while not over.wait(LOOK_EVERY_S):
            if time.monotonic() > deadline[0]:
                logger(__name__).error(
                    "nothing has ended for %.0f s (watch.hang_timeout_s): this rank's stack is in %s\n"
                    "  fix: the rank whose stack differs from the others' is what they wait for; if all is well and "
                    "it only takes long, raise watch.hang_timeout_s",
                    timeout_s,
                    path,
                )
                os._exit(1)

    with path.open("a") as file:
        alive()
        threading.Thread(target=end_when_late, daemon=True).start()
        try:
            yield alive
        finally:
            over.set()
            faulthandler.cancel_dump_traceback_later()
    if path.stat().st_size == 0:
        path.unlink()
