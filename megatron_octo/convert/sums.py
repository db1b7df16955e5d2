"""SHA-256 of the files that a conversion reads, taken beside it: from before it reads them, in the same order."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from megatron_octo import rundir

AHEAD_BYTES = 4 << 30
"""What is hashed before it is needed, at least: it is to be in the page cache still when it is read again."""
HASHED_BYTES = 64 << 20
"""As `rundir.HASHED_BYTES`; a map costs no buffer."""


class Sums:
    """Of some files; a context manager, at whose end what is not done is left."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Begin with the first file, in the order of the names."""
        self._sizes = {path: path.stat().st_size for path in sorted(files)}
        self._sums: dict[Path, Future[str]] = {}
        self._pool, self._lock, self._left = ThreadPoolExecutor(1), threading.Lock(), threading.Event()
        for first in list(self._sizes)[:1]:
            self.reach(first)

    def __enter__(self) -> Sums:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.set()
        self._pool.shutdown(cancel_futures=True)

    def reach(self, path: Path) -> None:
        """The conversion comes to `path`: hash it and what follows."""
        ahead = 0
        with self._lock:
            for each in itertools.dropwhile(path.__ne__, self._sizes):
                if each not in self._sums:
                    self._sums[each] = self._pool.submit(self._sum, each)
                ahead += self._sizes[each]
                if ahead > AHEAD_BYTES:
                    break

    def total(self) -> str:
        """One SHA-256 over all, once they are there."""
        for path in self._sizes:
            self.reach(path)
        return rundir.sha256_files({path.name: each.result() for path, each in self._sums.items()})

    def _sum(self, path: Path) -> str:
        return sha256(path, self._left.is_set)


def sha256(path: Path, left: Callable[[], bool] = bool) -> str:
    """The SHA-256 of a file as `rundir.sha256` takes it, in half the time; ends early once it is `left`.

    The file is mapped, part by part, as the conversion maps it: one that gets shorter meanwhile ends the process.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for start in itertools.takewhile(lambda _: not left(), range(0, size, HASHED_BYTES)):
            length = min(HASHED_BYTES, size - start)
            with mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_READ) as part:
                digest.update(part)
    return digest.hexdigest()
