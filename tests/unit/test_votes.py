"""What asks a rank to stop or to save."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_octo.train.votes import stop_signals, take_file


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_ends_nothing(signum):
    before = signal.getsignal(signum)
    with stop_signals() as received:
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)
        assert received == [signum, signum]
    assert signal.getsignal(signum) == before


def test_a_file_asks_once(tmp_path):
    path = tmp_path / "STOP"
    assert not take_file(path)
    path.touch()
    assert take_file(path)
    assert not take_file(path)
