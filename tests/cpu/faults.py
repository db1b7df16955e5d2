"""Operations on the disk that fail, or kill the process, at a chosen one, and more; installed on a rank by the zygote.

An operation is: a file opened to write, a write, an fsync, a rename, a folder made, a file or folder removed.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAVES = "/checkpoints/"
BUFFER = 1 << 16  # torch writes a few bytes at a time


def install(mode: str, at: int, record: str, rank: str = "0", where: str = SAVES) -> None:
    """From now on the operation numbered `at`, of those by `rank` on paths with `where` in them, does what `mode` says.

    kill: the process dies in it; error: it alone fails; full: it and all after it find the disk full. What is written
    then is written by half. Every operation adds its name to the file `record`.
    """
    if os.environ.get("RANK", "0") != rank:
        return
    log, numbers = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND), itertools.count(1)

    def meet(what: str, path: object, by_half: Callable[[], object] = lambda: None) -> None:
        if where not in f"{os.fsdecode(str(path))}/":  # the folder itself, too
            return
        number = next(numbers)  # threads count at once
        os.write(log, f"{what} {path}\n".encode())
        if number == at or (mode == "full" and number > at > 0 and what in ("open", "write", "mkdir")):
            by_half()
            if mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.EIO if mode == "error" else errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            meet("write", self.name, lambda: super(Raw, self).write(bytes(data)[: len(data) // 2]))
            return super().write(data)

    really_open, really_sync = builtins.open, os.fsync

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, str | os.PathLike) or not set(mode) & set("wax") or where not in os.fspath(file):
            return really_open(file, mode, *args, **kwargs)
        meet("open", file)
        buffered = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")), BUFFER)
        return buffered if "b" in mode else io.TextIOWrapper(buffered)

    def fsync(descriptor: int) -> None:
        meet("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
        really_sync(descriptor)

    def met(name: str) -> Any:
        really = getattr(os, name)

        def call(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
            meet(name, path if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / path)
            return really(path, *args, **kwargs, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        return call

    builtins.open = io.open = open_  # type: ignore[assignment]
    os.fsync = fsync  # type: ignore[assignment]
    for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, met(name))


def write_slowly(seconds: float) -> None:
    """From now on writing a save's tensors takes so much longer."""
    from megatron_octo.platform import checkpoint_writer

    really = checkpoint_writer.write

    def write(request: Any) -> Any:
        time.sleep(seconds)
        return really(request)

    checkpoint_writer.write = write


def signal_in_forward(step: int, batch: int, rank: str) -> None:
    """The rank gets SIGUSR1 in each forward pass of this step, of `batch` sequences a step."""
    from megatron_octo.data.loader import Loader

    really = Loader._micro_batch

    def micro_batch(self: Any, numbers: range) -> Any:
        if numbers.start // batch + 1 == step and os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return really(self, numbers)

    Loader._micro_batch = micro_batch  # type: ignore[method-assign]


def write_at_once() -> None:
    """From now on training waits while a save is written."""
    from megatron_octo.train.saver import Saver

    really = Saver.save

    def save(self: Any, *args: Any) -> None:
        really(self, *args)
        self.wait()

    Saver.save = save  # type: ignore[method-assign]
