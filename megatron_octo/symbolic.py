"""math-verify in a process of its own, which the kernel ends when a comparison takes too long or too much memory.

math-verify's own time limits are signals, which only a main thread can have, and exact arithmetic on what a model wrote
may run for ever. This file run as a script is that process: a line comes in with pairs of answers as JSON, a verdict
and the processor seconds so far go out.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

CPU_SECONDS = 2.0  # for all pairs of one answer; the hardest of tests/unit/grading_cases.py takes 0.2
WALL_SECONDS = 60.0  # for a machine so busy that the process gets no time
MEMORY_BYTES = 4 * 1024**3


class Undecided(Exception):
    """No verdict: out of time or memory, or the process could not run."""


class Engine:
    """Starts the process when it is first needed, and again after it was ended. Callable from any thread."""

    def __init__(self, *, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._counted = 0.0  # of its processor seconds
        self._endless: set[tuple[tuple[str, str], ...]] = set()  # what ran into the limit is not tried again
        self._thread = threading.local()

    @property
    def seconds(self) -> float:
        """Processor seconds of the processes, their starts included, for what the calling thread asked."""
        seconds: float = getattr(self._thread, "seconds", 0.0)
        return seconds

    def equal(self, *pairs: tuple[str, str]) -> bool:
        """Whether math-verify takes the answer for the reference in any (answer, reference); one limit is for all.

        Raises:
            Undecided: it came to no verdict.
        """
        with self._lock:
            if pairs in self._endless:
                raise Undecided("math-verify ran out of time at it before")
            process, self._process = self._process, None  # kept again when it has answered
            if process is None or process.poll() is not None:
                process, self._counted = _start(self._cpu_seconds), 0.0
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(pairs) + "\n")
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], WALL_SECONDS)
                line = process.stdout.readline() if ready else ""
            except BrokenPipeError:
                line = ""
            verdict, used = json.loads(line) if line else (None, _end(process))
            self._thread.seconds = self.seconds + used - self._counted
            if not line:
                if process.returncode == -signal.SIGPROF:
                    self._endless.add(pairs)
                raise Undecided(f"math-verify's process ended with code {process.returncode}")
            self._process, self._counted = process, used
        if verdict is None:
            raise Undecided("math-verify failed")
        return bool(verdict)


def equal(*pairs: tuple[str, str]) -> bool:
    """`Engine.equal` of one process, which serves all threads of this one.

    Raises:
        Undecided: it came to no verdict.
    """
    return _engine(os.getpid()).equal(*pairs)


def seconds() -> float:
    """`Engine.seconds` of that process: what `equal` has cost the calling thread's answers so far."""
    return _engine(os.getpid()).seconds


@functools.cache
def _engine(pid: int) -> Engine:  # of a process: a fork must not talk to its parent's
    return Engine()


def _start(cpu_seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(cpu_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # an interrupt from the keyboard is for the parent, whose end is the end of our input
    )
    assert process.stdout is not None
    process.stdout.readline()  # its imports, a minute on a machine that is busy enough, are no part of a comparison
    return process


def _end(process: subprocess.Popen[str]) -> float:
    """End the process; the processor seconds of all its life."""
    os.kill(process.pid, signal.SIGKILL)  # process.kill() would reap one that has ended, and lose what it used
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.communicate()
    return usage.ru_utime + usage.ru_stime


def main(cpu_seconds: float) -> None:
    """Compare what comes in until there is no more."""
    from math_verify import parse, verify
    from sympy import Basic, I

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    def parsed(text: str) -> list[Any]:
        found = parse(f"\\boxed{{{text}}}", parsing_timeout=None)
        return [each.subs(imaginary(each)) if isinstance(each, Basic) else each for each in found]

    def imaginary(expression: Basic) -> dict[Basic, Basic]:
        return {symbol: I for symbol in expression.free_symbols if str(symbol) == "i"}

    def equal(answer: str, reference: str) -> bool:
        a, b = parsed(answer), parsed(reference)
        return bool(a and b and verify(b, a, allow_set_relation_comp=True, timeout_seconds=None))

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            verdict = any(equal(*pair) for pair in json.loads(line))
        except Exception:  # sympy on what a model wrote
            verdict = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps([verdict, time.process_time()]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
