"""math-verify in a process of its own, which the kernel ends when a comparison takes too long or too much memory.

math-verify's own time limits are signals, which only a main thread can have, and exact arithmetic on what a model wrote
may run for ever. This file run as a script is that process: two answers a line come in as JSON, a verdict
goes out.
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
from typing import Any

CPU_SECONDS = 5.0  # for one comparison; math-verify's own limit is five seconds as well
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

    def equal(self, answer: str, reference: str) -> bool:
        """Whether math-verify takes the answer for the reference.

        Raises:
            Undecided: it came to no verdict.
        """
        with self._lock:
            process, self._process = self._process, None  # kept again when it has answered
            if process is None or process.poll() is not None:
                process = _start(self._cpu_seconds)
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([answer, reference]) + "\n")
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], WALL_SECONDS)
                verdict = process.stdout.readline() if ready else ""
            except BrokenPipeError:
                verdict = ""
            if not verdict:
                process.kill()
                process.communicate()
                raise Undecided(f"math-verify's process ended with code {process.returncode}")
            self._process = process
        if verdict == "null\n":
            raise Undecided("math-verify failed")
        return bool(json.loads(verdict))


def equal(answer: str, reference: str) -> bool:
    """Whether math-verify takes the answer for the reference; one process serves all threads of this one.

    Raises:
        Undecided: it came to no verdict.
    """
    return _engine(os.getpid()).equal(answer, reference)


@functools.cache
def _engine(pid: int) -> Engine:  # of a process: a fork must not talk to its parent's
    return Engine()


def _start(cpu_seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", __file__, str(cpu_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # an interrupt from the keyboard is for the parent, whose end is the end of our input
    )


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

    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            answer, reference = map(parsed, json.loads(line))
            same = verify(reference, answer, allow_set_relation_comp=True, timeout_seconds=None)
            verdict = bool(answer and reference and same)
        except Exception:  # sympy on what a model wrote
            verdict = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
