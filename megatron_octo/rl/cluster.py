"""One process that holds a Ray cluster, or joins one, and runs OpenRLHF on it, as often as asked.

Starting Ray and importing OpenRLHF is most of what a small run costs, so runs in a row share both.
Without RAY_ADDRESS the cluster is this machine's own: its files in a temporary folder, closed to who lacks
the token in there. It ends with the process that opened it, whatever ends that: the kernel kills the engine,
Ray's processes follow the engine, and what is left is swept up.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_octo import console
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.rl.command import environment

MARKER = "OCTO_RL_CLUSTER"  # names the cluster in the environment of each of its processes
ADDRESS = "RAY_ADDRESS"  # of the cluster to join
FOLDER, TOKEN = "octo-ray-", "ray_token"
READY = "ready"  # what an engine says first
type Message = str | dict[str, str]
"""What an engine says. A dictionary: `what` and `fix` of bad input."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray takes 127.0.0.1 for the machine's other address
START_TRIES = 3
STOP_TIMEOUT_S = 20
DRAIN_S = 1.5  # Ray forwards its workers' last lines with a delay
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

log = console.logger(__name__)


class RunFailed(Exception):
    """OpenRLHF ended with an error, or its process did."""


class NotStarted(Exception):
    """Ray did not start."""


@dataclass(slots=True)
class Cluster:
    """A running engine. Runs go one after the other."""

    process: subprocess.Popen[bytes]
    status: int
    """File descriptor of the engine's messages."""
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    buffers: dict[int, bytes] = field(default_factory=dict)
    """The unfinished line of each pipe."""

    def wait_ready(self) -> None:
        """Wait until Ray runs.

        Raises:
            NotStarted: it does not; the message has the end of what it said.
            BadInput: it does, and is not one for this run.
        """
        lines = deque[str](maxlen=200)
        message = self._follow(lines.append, lambda: False)
        if isinstance(message, dict):
            raise BadInput(**message)
        if message != READY:
            raise NotStarted("\n".join([str(message), *(f"    {line}" for line in meaningful(lines))]))

    def run(
        self, arguments: Sequence[str], on_line: Callable[[str], None], until: Callable[[], bool] = lambda: False
    ) -> bool:
        """Run OpenRLHF with `arguments`; each line it prints goes to `on_line`. Returns whether it came to its end.

        Otherwise `until`, asked now and then, was true first. OpenRLHF still runs: the cluster is of no use but to end.

        Raises:
            RunFailed: it failed. The cluster is of no use then.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
            self.process.stdin.flush()
        message = self._follow(on_line, until)
        if message not in ("finished", None):
            raise RunFailed(message)
        return message is not None

    def _follow(self, on_line: Callable[[str], None], until: Callable[[], bool]) -> Message | None:
        """Hand out lines until the engine says how the run ended, or dies; returns what it said, None for `until`."""
        message: Message = ""
        deadline = float("inf")
        while time.monotonic() < deadline:
            if not message and until():
                return None
            for source, lines in self._read(timeout_s=0.5):
                if source != self.status:
                    for line in lines:
                        on_line(line)
                elif lines:
                    message, deadline = json.loads(lines[-1]), time.monotonic() + DRAIN_S
            if not message and self.process.poll() is not None:
                message = f"its process ended with code {self.process.returncode}"
                deadline = time.monotonic() + DRAIN_S
        return message

    def _read(self, timeout_s: float) -> Iterator[tuple[int, list[str]]]:
        events = self.selector.select(timeout_s)
        if not self.selector.get_map():
            time.sleep(timeout_s)
        for key, _ in events:
            data = os.read(key.fd, 65_536)
            if not data:
                self.selector.unregister(key.fd)
            *lines, self.buffers[key.fd] = (self.buffers.get(key.fd, b"") + data).split(b"\n")
            yield key.fd, [_clean(line) for line in lines]


def _clean(line: bytes) -> str:
    """A line as a terminal would show it: the last redraw of a progress bar, without colours."""
    return _ESCAPES.sub("", line.decode(errors="replace").rstrip("\r").rpartition("\r")[2])


def cluster(*, num_nodes: int, num_gpus: int, cuda: bool) -> contextlib.AbstractContextManager[Cluster]:
    """An engine on a cluster of nodes with `num_gpus` devices each (logical ones without CUDA), and its end.

    The cluster is the one at RAY_ADDRESS, else this machine's own, which is started, and ends with the engine.
    Call it from the main thread: the engine dies with the thread that starts it, and SIGTERM is handled meanwhile.

    Raises:
        OctoError: Ray does not start, or cannot be joined.
        BadInput: the cluster has GPUs, and `cuda` is False.
    """
    address = os.environ.get(ADDRESS)
    return started(
        lambda: _engine(address, num_nodes=num_nodes, num_gpus=num_gpus, cuda=cuda),
        tries=1 if address else START_TRIES,
        fix=f"{ADDRESS} is {address}: is Ray there (`ray status`), with these devices and this token "
        f"(RAY_AUTH_TOKEN_PATH)? Without {ADDRESS} this machine's own Ray is started"
        if address
        else "is the machine out of memory, or /tmp full, or is it too busy? Then run it again",
    )


@contextlib.contextmanager
def started[T](start: Callable[[], contextlib.AbstractContextManager[T]], *, tries: int, fix: str) -> Iterator[T]:
    """Enter what `start` makes; where Ray does not start in it, as on a busy machine, try again.

    Raises:
        OctoError: it did not at the last try either.
    """
    for left in reversed(range(tries)):
        with contextlib.ExitStack() as stack:
            try:
                entered = stack.enter_context(start())
            except NotStarted as failure:
                if not left:
                    raise OctoError(f"Ray is not ready: {failure}", fix=fix) from None
                log.warning("Ray did not start, and is tried again (%d left): %s", left, failure)
                continue
            yield entered
            return


@contextlib.contextmanager
def _engine(address: str | None, *, num_nodes: int, num_gpus: int, cuda: bool) -> Iterator[Cluster]:
    """One try at `cluster`.

    Raises:
        NotStarted: so it is; nothing is left of it.
    """
    with home() as (folder, marks):
        env = environment(os.environ, cuda=cuda) | marks
        if not address:
            write_token(folder / TOKEN)
            env |= token_environment(folder / TOKEN) | LOOPBACK
        status, engine_status = os.pipe()
        asked = {
            "address": address,
            "folder": str(folder),
            "num_nodes": num_nodes,
            "num_gpus": num_gpus,
            "cuda": cuda,
            "status": engine_status,
            "parent": os.getpid(),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_octo.rl.engine", json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=(engine_status,),
            start_new_session=True,  # an interrupt from the keyboard is ours to handle
        )
        os.close(engine_status)
        assert process.stdout is not None
        out = Cluster(process, status)
        for fd in (process.stdout.fileno(), status):
            out.selector.register(fd, selectors.EVENT_READ)
        before = signal.signal(signal.SIGTERM, _end)
        try:
            out.wait_ready()
            yield out
        finally:
            signal.signal(signal.SIGTERM, before)
            out.selector.close()
            _stop(process)
            os.close(status)


@contextlib.contextmanager
def home() -> Iterator[tuple[Path, dict[str, str]]]:
    """A temporary folder for Ray, and what marks its processes in their environment; both are gone afterwards."""
    _clear_stale()
    name = uuid.uuid4().hex[:8]
    folder = Path("/tmp") / f"{FOLDER}{os.getpid()}-{name}"  # Ray's sockets' names may have 107 characters in all
    folder.mkdir(mode=0o700)
    try:
        yield folder, {MARKER: name, "HF_DATASETS_CACHE": str(folder / "datasets")}
    finally:
        _sweep(name)
        shutil.rmtree(folder, ignore_errors=True)


def write_token(path: Path) -> None:
    """A new token for Ray's clients, in a file that only its owner reads."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def token_environment(path: Path) -> dict[str, str]:
    """What has Ray, and its clients, ask for the token and show it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), "RAY_AUTH_TOKEN": ""}


def _end(number: int, _: object) -> None:
    """A scheduler's SIGTERM unwinds as an interrupt does, so that Ray ends with us."""
    raise SystemExit(128 + number)


def _clear_stale() -> None:
    """End and remove what clusters left whose owner was killed: processes, which may hold a GPU, and folders."""
    for folder in Path("/tmp").glob(f"{FOLDER}*"):
        owner, _, name = folder.name.removeprefix(FOLDER).partition("-")
        if not Path("/proc", owner).exists():
            _sweep(name)
            shutil.rmtree(folder, ignore_errors=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the engine, and with it Ray: first politely, then by force."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _sweep(name: str, patience_s: float = 5.0) -> None:
    """Kill what is left of the cluster called `name`, and nothing else, after a moment to end by itself."""
    deadline = time.monotonic() + patience_s
    while (left := members(name)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def members(name: str) -> list[int]:
    """Process ids of the cluster called `name`: they carry the name in their environment."""
    wanted = f"{MARKER}={name}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def meaningful(lines: Sequence[str], most: int = 8) -> list[str]:
    """The lines of a log that say why it ended: those up to the first error, and the last error.

    One process's error makes others fail in turn, so the first is the cause. Without any error: the last lines.
    """
    kept = [_PREFIXES.sub("", line)[:400] for line in lines if line.strip() and not _ROUTINE.search(line)]
    errors = [index for index, line in enumerate(kept) if _ERROR.search(line)]
    if not errors:
        return kept[-most:]
    first, last = errors[0], errors[-1]
    cause = kept[max(0, first - most + 1) : first + 1]
    return cause if kept[last] == kept[first] else [*cause, "...", kept[last]]


# Who said it: Ray's worker, vLLM's engine, a logger.
_PREFIXES = re.compile(r"^(?:\([^)]*pid=\d+[^)]*\) ?|ERROR [0-9-]+ [0-9:]+ \[[^]]*\] ?)+")
_ROUTINE = re.compile(
    r"\b(?:INFO|WARNING)\b|it/s\]|s/it\]|\?it|Warning|warnings\.warn|\^\^\^|~~~|pynvml|namespace\(|Global step|Sample: "
)
_ERROR = re.compile(r"^\s*(?:\w+\.)*\w*(?:Error|Exception)\b.*|died unexpectedly|\bKilled\b|OutOfMemory")


def require_linux() -> None:
    """Refuse to start where the kernel cannot tie processes to each other.

    Raises:
        OctoError: not on Linux.
    """
    if sys.platform != "linux":
        raise OctoError(f"RL runs on Linux, not on {sys.platform}", fix="run it on a Linux machine or in a container")
