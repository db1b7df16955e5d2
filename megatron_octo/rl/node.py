"""One node's part in RL on several: the first holds Ray's head and runs `octo rl`, the others lend it their devices.

`octo slurm node` is it, once a node. What a node starts ends with it, and the others end when the first one's Ray does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_octo import console
from megatron_octo.errors import OctoError
from megatron_octo.platform.process import octo_command, tied_child
from megatron_octo.rl.cluster import ADDRESS, START_TRIES, NotStarted, home, started, token_environment, write_token
from megatron_octo.rl.command import environment
from megatron_octo.rl.engine import resources, start_ray
from megatron_octo.rl.preflight import has_gpu

HEAD_TIMEOUT_S = 600.0
UP = "ray_current_cluster"  # a file in Ray's folder, which `ray start` writes when the node is part of the cluster

log = console.logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the nodes of a job meet, and what this one brings."""

    host: str
    """The first node's address, at which the others look for the head; Ray listens on all that the node has."""
    port: int
    token: Path
    """The file that the first node writes, on a disk that all see."""
    num_gpus: int

    @property
    def address(self) -> str:
        """Of the head."""
        return f"{self.host}:{self.port}"

    @property
    def begun(self) -> Path:
        """The file that says that the others may join."""
        return self.token.with_name("ray_has_begun")

    def is_open(self, *, tries: int = 1) -> bool:
        """Whether the head takes connections."""
        for _ in range(tries):
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), timeout=5):
                return True
            time.sleep(1)
        return False


def lead(meeting: Meeting, argv: Sequence[str]) -> int:
    """Hold Ray's head, run `octo ARGV` on it, and end both; returns the exit code."""
    write_token(meeting.token)
    try:
        with _ray(meeting, _head):
            meeting.begun.touch()
            run_on = {ADDRESS: meeting.address, **token_environment(meeting.token)}
            with tied_child(octo_command(*argv), env=run_on) as run:
                return run.wait()
    finally:
        meeting.begun.unlink(missing_ok=True)
        meeting.token.unlink(missing_ok=True)


def follow(meeting: Meeting) -> None:
    """Be a node of the first one's cluster for as long as that is there.

    Raises:
        OctoError: there is none, or Ray ended here before it did there.
    """
    deadline = time.monotonic() + HEAD_TIMEOUT_S
    while not meeting.begun.exists():
        if time.monotonic() > deadline:
            raise OctoError(
                f"the first node's Ray has not begun within {HEAD_TIMEOUT_S:g} s: there is no {meeting.begun}",
                fix="see what the first node says; do all nodes see that folder?",
            )
        time.sleep(1)
    with _ray(meeting, _worker) as ray:
        while ray.poll() is None:
            if not meeting.is_open(tries=3):
                return
            time.sleep(1)
    if meeting.is_open():
        raise OctoError(
            f"Ray ended on {socket.gethostname()}, with code {ray.returncode}", fix="its lines above say why"
        )


def _ray(
    meeting: Meeting, command: Callable[[Meeting, Path, bool], list[str]]
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """This node's part of Ray, started by `command`, and its end."""
    return started(
        lambda: _try_ray(meeting, command),
        tries=START_TRIES,
        fix="is this node out of memory, or /tmp full, or is it too busy? Its lines above say more",
    )


@contextlib.contextmanager
def _try_ray(
    meeting: Meeting, command: Callable[[Meeting, Path, bool], list[str]]
) -> Iterator[subprocess.Popen[bytes]]:
    cuda = has_gpu()
    with home() as (folder, marks):
        env = environment(os.environ, cuda=cuda) | marks | token_environment(meeting.token)
        env["RAY_GCS_SERVER_PORT"] = str(meeting.port)  # `ray.init` has no argument for it
        with tied_child(command(meeting, folder, cuda), env=env, without=os.environ) as ray:
            while not (folder / UP).exists():
                if ray.poll() is not None:
                    raise NotStarted(f"it ended with code {ray.returncode} on {socket.gethostname()}")
                time.sleep(0.2)
            yield ray


def _head(meeting: Meeting, folder: Path, cuda: bool) -> list[str]:
    """Not by `ray start`, which cannot leave Ray Client's server out."""
    settings = (str(folder), meeting.host, str(meeting.num_gpus), str(int(cuda)))
    return [sys.executable, "-m", "megatron_octo.rl.node", *settings]


def _worker(meeting: Meeting, folder: Path, cuda: bool) -> list[str]:
    shares = resources(num_gpus=meeting.num_gpus, cuda=cuda)
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
        *(f"--address={meeting.address}", f"--temp-dir={folder}"),
        *(f"--{name.replace('_', '-')}={value}" for name, value in shares.items()),
        # any free port: another node may be on this machine
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]


def _hold(folder: Path, host: str, num_gpus: int, cuda: bool) -> None:
    """Start the head, say so, and stay."""
    start_ray(folder, num_gpus=num_gpus, cuda=cuda, host=host)
    (folder / UP).touch()
    threading.Event().wait()


if __name__ == "__main__":
    _, _folder, _host, _num_gpus, _cuda = sys.argv
    _hold(Path(_folder), _host, int(_num_gpus), bool(int(_cuda)))
