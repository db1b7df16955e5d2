"""Children that never outlive their parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_octo.platform.process import STOP_SIGNALS

CHILD = "import sys, time; sys.stdout.write('up\\n'); sys.stdout.flush(); time.sleep(60)"
PARENT = f"""
import sys
from megatron_octo.platform.process import run_launcher
run_launcher([sys.executable, "-c", {CHILD!r}])
"""


def test_a_child_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    (child,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


RANK = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("up", flush=True)
time.sleep(60)
"""
LAUNCHER = f"""
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "-c", {RANK!r}]))
"""
LAUNCHES = f"""
import sys
from megatron_octo.platform.process import run_launcher
sys.exit(run_launcher([sys.executable, "-c", {LAUNCHER!r}]))
"""


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_what_asks_to_stop_goes_past_the_launcher_to_the_ranks_as_sigterm(signum):
    process = subprocess.Popen([sys.executable, "-c", LAUNCHES], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signum)
    assert process.wait(10) == 3


def test_the_exit_code_is_the_childs():
    from megatron_octo.platform.process import run_launcher

    assert run_launcher([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_memory_of_a_whole_family_is_watched():
    from megatron_octo.platform.process import run_and_watch

    grandchild = "import time; b = bytearray(300 << 20); time.sleep(2.5)"
    notes: list[tuple[float, float]] = []
    code = run_and_watch(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"],
        lambda seconds, peak_gib: notes.append((seconds, peak_gib)),
    )
    assert code == 0
    seconds, peak_gib = notes[-1]
    assert seconds > 2.5
    assert 0.29 < peak_gib < 0.6
