"""Ranks in a second: one process imports megatron-core once and forks what tests ask for.

`python -m tests.cpu.zygote` reads requests from stdin, a JSON line each; tests use it as the fixture `zygote`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.train import MidTrainConfig
from tests.conftest import REPOSITORY

WAIT_S = 300.0
SAID_BYTES = 4000
NEEDED = (
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron_octo.train.run",
    "torch._dynamo.variables",  # by the first custom operator
    "torch._inductor.test_operators",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",  # by a conversion
    "transformers.models.llama.modeling_llama",
)
"""What a stage imports in its first steps."""


class Zygote:
    """The process, as a test sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.cpu.zygote"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def octo(self, *argv: object, log: Path, ranks: int = 1, before: Sequence[object] = ()) -> Ranks:
        """Start `octo ARGV` (nothing if empty) on so many ranks, of one group. Their output is added to `log`.

        `before` is a function to call first on each rank, `module:name`, and its arguments.
        """
        asked = {
            "do": "start",
            "argv": [str(each) for each in argv],
            "ranks": ranks,
            "log": str(log),
            "before": list(before),
            "runs": os.environ.get("OCTO_RUNS", "runs"),
        }
        return Ranks(zygote=self, pids=self.ask(asked), log=log)

    def call(self, function: str, *args: object, log: Path, ranks: int = 1) -> Ranks:
        """Start `function`, `module:name`, with these arguments on so many ranks, of one group."""
        return self.octo(log=log, ranks=ranks, before=(function, *args))

    def run(self, function: str, *args: object, log: Path, ranks: int = 1, timeout_s: float = WAIT_S) -> None:
        """As `call`, to the end; the test fails with their last words unless all end well."""
        codes = self.call(function, *args, log=log, ranks=ranks).wait(timeout_s)
        assert codes == [0] * ranks, f"exit codes {codes}: {log.read_text()[-SAID_BYTES:]}"

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Processes of one group."""

    zygote: Zygote
    pids: list[int]
    log: Path

    def wait(self, timeout_s: float = WAIT_S) -> list[int]:
        """Their exit codes once all have ended, negative for a signal; those that have not by then are killed."""
        return self.zygote.ask({"do": "wait", "pids": self.pids, "timeout_s": timeout_s})

    def send(self, signum: signal.Signals, *ranks: int) -> None:
        """Send a signal to these ranks, to all if none is named."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], signum)

    def wait_until(self, what: Callable[[], bool]) -> None:
        """Wait until `what` holds."""
        end = time.monotonic() + WAIT_S
        while not what():
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.02)


def octo(
    zygote: Zygote, config: MidTrainConfig, folder: Path, *, ranks: int = 1, before: Sequence[object] = ()
) -> Ranks:
    """Start `octo train` with these settings; its log is in `folder`."""
    rundir.write_json(folder / f"{config.name}.json", to_dict(replace(config, log_every_steps=1)))
    return zygote.octo("train", folder / f"{config.name}.json", log=folder / "log", ranks=ranks, before=before)


def rows(run: Path) -> list[tuple[float, ...]]:
    """Step, tokens, loss and gradient norm of each step in a run's metrics."""
    if not (run / "metrics.jsonl").exists():
        return []
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    names = ("step", "tokens", "train/loss", "optim/grad_norm")
    return [tuple(row[name] for name in names) for row in map(json.loads, lines)]


def serve() -> None:
    """Import what training needs, then answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    from megatron_octo.platform import resolve

    resolve().activate()
    for module in NEEDED:
        importlib.import_module(module)
    gc.freeze()  # collections in the children would walk, and so copy, all that was imported

    handlers = {"start": start, "wait": wait}
    for line in sys.stdin:
        request = json.loads(line)
        answer = handlers[request.pop("do")](**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def start(*, ranks: int, **task: Any) -> list[int]:
    """Fork the ranks; returns their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    parent, pids = os.getpid(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            become_rank({"MASTER_ADDR": "127.0.0.1", **group} if ranks > 1 else {}, parent=parent, **task)
        pids.append(pid)
    return pids


def become_rank(
    environment: dict[str, Any], *, parent: int, argv: list[str], log: str, before: list[Any], runs: str
) -> None:
    """What a forked process does; never returns."""
    from megatron_octo.cli.app import main
    from megatron_octo.platform.process import die_with

    code = 1
    try:
        die_with(parent, signal.SIGKILL)
        os.environ.update({name: str(value) for name, value in environment.items()}, OCTO_RUNS=runs)
        with Path(log).open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if before:
            module, _, name = before[0].partition(":")
            getattr(importlib.import_module(module), name)(*before[1:])
        code = main(argv) if argv else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(*, pids: list[int], timeout_s: float) -> list[int]:
    """The exit codes of all; after `timeout_s` those left are killed."""
    end, codes = time.monotonic() + timeout_s, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve()
