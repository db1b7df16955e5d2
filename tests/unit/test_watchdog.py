"""What ends a job that hangs."""

from __future__ import annotations

import threading

from megatron_octo.train import watchdog as module
from megatron_octo.train.watchdog import watchdog


def test_a_hang_before_the_first_sign_of_life_ends_the_job_and_leaves_its_stack(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(module, "GRACE_S", 0.2)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    with watchdog(tmp_path, 0.05):
        assert ended.wait(20)
    (stack,) = (tmp_path / "log").iterdir()
    assert "test_watchdog.py" in stack.read_text()
