"""Signals that ask a rank to stop."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_octo.train.votes import stop_signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_ends_nothing(signum):
    before = signal.getsignal(signum)
    with stop_signals() as received:
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)
        assert received == [signum, signum]
    assert signal.getsignal(signum) == before
