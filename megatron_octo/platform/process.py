"""Child processes that never outlive their parent: a killed stage leaves no orphan that holds its run folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""They ask training to save and to end; Slurm sends either before it takes a machine away."""
GRACE_S = 30.0
SAMPLE_MEMORY_EVERY_S = 2.0
SAMPLES_A_NOTE = 5
GIB = 1024**3


def octo_command(*args: str) -> list[str]:
    """The command line of another `octo` command, run by this very interpreter."""
    return [sys.executable, "-m", "megatron_octo", *args]


def child_environment(extra: Mapping[str, str] | None = None, without: Collection[str] = ()) -> dict[str, str]:
    """This environment with the interpreter's folder first on PATH: its `ninja` and `torchrun` are found by name."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ours = {name: value for name, value in os.environ.items() if name not in without}
    return {**ours, "PATH": path, **(extra or {})}


def die_with(parent: int, signum: signal.Signals) -> None:
    """Have the kernel send this process `signum` when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


@contextlib.contextmanager
def tied_child(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    output: IO[Any] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `argv`; the kernel sends it SIGTERM should this process die, and leaving the block ends it.

    `env` adds to this process's environment, `without` takes from it. `output` receives stdout and stderr together;
    None leaves both to the terminal.
    """
    parent = os.getpid()
    child = subprocess.Popen(
        list(argv),
        env=child_environment(env, without),
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        preexec_fn=lambda: die_with(parent, signal.SIGTERM),  # noqa: PLW1509 - system calls only: no lock guards them
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


def run_launcher(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> int:
    """Run `argv`, which starts ranks, to its end and return its exit code.

    Meanwhile STOP_SIGNALS go past it to the ranks, as SIGTERM: they save and end in their own time. torchrun would
    grant them 30 s and then end as failed. Before there are ranks, the signals end `argv`.
    """
    import psutil

    def pass_on(signum: int, frame: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(child.pid).children() or [child]:
                process.terminate()

    previous = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for torchrun, which inherits it: Slurm signals every process
    try:
        with tied_child(argv, env=env) as child:
            for each in STOP_SIGNALS:
                signal.signal(each, pass_on)
            return child.wait()
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def run_and_watch(argv: Sequence[str], note: Callable[[float, float], None]) -> int:
    """Run `argv` to its end and return its exit code.

    `note` is told, now and then and at the end, the seconds so far and the peak memory of `argv` and its descendants,
    GiB. Memory is the sum of the proportional set sizes: a page that processes share counts once.
    """
    start, peak, over = time.monotonic(), [0.0], threading.Event()

    def watch(pid: int) -> None:
        samples = 0
        while not over.wait(SAMPLE_MEMORY_EVERY_S):
            peak[0] = max(peak[0], family_memory_gib(pid))
            samples += 1
            if samples % SAMPLES_A_NOTE == 0:
                note(time.monotonic() - start, peak[0])

    with tied_child(argv) as child:
        watcher = threading.Thread(target=watch, args=(child.pid,), daemon=True)
        watcher.start()
        try:
            return child.wait()
        finally:
            over.set()
            watcher.join()
            note(time.monotonic() - start, peak[0])


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
