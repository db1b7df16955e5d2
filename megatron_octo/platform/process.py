"""Child processes that never outlive their parent: a killed stage leaves no orphan that holds its run folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_S = 30.0
SAMPLE_MEMORY_EVERY_S = 2.0
GIB = 1024**3


def octo_command(*args: str) -> list[str]:
    """The command line of another `octo` command, run by this very interpreter."""
    return [sys.executable, "-m", "megatron_octo", *args]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with the interpreter's folder first on PATH: its `ninja` and `torchrun` are found by name."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, **(extra or {})}


@contextlib.contextmanager
def tied_child(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    output: IO[Any] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `argv`; the kernel sends it SIGTERM should this process die, and leaving the block ends it.

    `output` receives stdout and stderr together; None leaves both to the terminal.
    """
    parent = os.getpid()

    def tie() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    child = subprocess.Popen(
        list(argv),
        env=child_environment(env),
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        preexec_fn=tie,  # noqa: PLW1509 - calls prctl and getppid only, which no lock guards
    )
    try:
        yield child
    finally:
        stop(child)


def stop(child: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """Ask `child` to end, then make it."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, so that children are ended and locks let go."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> int:
    """Run `argv` to its end and return its exit code (negative: killed by that signal)."""
    with tied_child(argv, env=env) as child:
        return child.wait()


def run_and_watch(argv: Sequence[str]) -> tuple[int, float]:
    """Run `argv` to its end; return its exit code and the peak memory of it and its descendants, GiB.

    Memory is the sum of the proportional set sizes: a page that processes share counts once.
    """
    peak, over = [0.0], threading.Event()

    def watch(pid: int) -> None:
        while not over.wait(SAMPLE_MEMORY_EVERY_S):
            peak[0] = max(peak[0], family_memory_gib(pid))

    with tied_child(argv) as child:
        watcher = threading.Thread(target=watch, args=(child.pid,), daemon=True)
        watcher.start()
        try:
            return child.wait(), peak[0]
        finally:
            over.set()


def family_memory_gib(pid: int) -> float:
    """Memory of process `pid` and its descendants now, GiB; what has just ended counts nothing."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / GIB
