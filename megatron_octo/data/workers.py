"""A function over many inputs in several processes: results in the inputs' order, few inputs in memory at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from megatron_octo.errors import OctoError
from megatron_octo.platform.process import die_with

AHEAD = 2  # inputs that wait at a worker, so that it never waits for the next
MOST_WORKERS = 32  # beyond it one process cannot read and write fast enough


def default_workers() -> int:
    """One a core that this process may use."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def ordered[A, B](function: Callable[[A], B], inputs: Iterable[A], num_workers: int) -> Generator[B]:
    """Yield `function` of each input, in order. One worker is this process itself.

    The workers are forks, so `function` may be anything; inputs and results are pickled. They die with this process.

    Raises:
        OctoError: a worker died.
    """
    if num_workers == 1:
        yield from map(function, inputs)
        return
    with _workers(function, num_workers) as pipes:
        sent = taken = 0
        for each in inputs:
            if sent - taken == AHEAD * num_workers:
                yield _result(pipes[taken % num_workers])
                taken += 1
            _send(pipes[sent % num_workers], each)
            sent += 1
        for number in range(taken, sent):
            yield _result(pipes[number % num_workers])


@contextlib.contextmanager
def _workers(function: Callable[[Any], Any], count: int) -> Iterator[list[Connection]]:
    context, parent = multiprocessing.get_context("fork"), os.getpid()
    processes, pipes = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs, parent), daemon=True)
            process.start()
            theirs.close()  # else a worker's death would not show as the end of its pipe
            processes.append(process)
            pipes.append(ours)
        yield pipes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _serve(function: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    die_with(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    _let_go_of_files(but=pipe.fileno())
    waiting: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_feed, args=(pipe, waiting), daemon=True).start()
    while True:
        try:
            answer = (True, function(waiting.get()))
        except Exception as error:  # the parent's to raise
            answer = (False, error)
        except BaseException as error:  # a panic of Rust's, which cannot be pickled
            answer = (False, RuntimeError(f"{type(error).__name__}: {error}"))
        pipe.send(answer)


def _let_go_of_files(*, but: int) -> None:
    """Close what the fork inherited: a lock, say, would outlive the parent until the kernel has killed this process."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are wanted
        if int(name) > 2 and int(name) != but:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _feed(pipe: Connection, waiting: queue.Queue[Any]) -> None:
    """Take inputs in while the worker works: the parent's sending must not wait for the worker's result."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            waiting.put(pipe.recv())


def _send(pipe: Connection, value: Any) -> None:
    try:
        pipe.send(value)
    except OSError:
        raise _died() from None


def _result(pipe: Connection) -> Any:
    try:
        good, value = pipe.recv()
    except (EOFError, OSError):
        raise _died() from None
    if not good:
        raise value
    return value


def _died() -> OctoError:
    return OctoError(
        "a worker process died", fix="if memory ran out, use fewer (--workers); run it again to go on from here"
    )
