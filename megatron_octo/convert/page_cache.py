"""What the kernel is told of files much larger than memory: what will be read, what is done with, what to write now."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import torch

LIBC = ctypes.CDLL(None)
MADV_COLD, MADV_POPULATE_READ = 20, 22  # linux/mman.h; Python's mmap has no names for them
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
WRITE_EVERY_S = 0.05
READ_AHEAD_BYTES = 128 << 10
"""The kernel reads no more at one request than a disk's own read-ahead, of which this is the usual one."""


def read_ahead(mapped: torch.Tensor) -> None:
    """Begin to read a tensor that is a part of a file; by one page fault after another a disk gives a third."""
    start, end = _pages(mapped)
    for each in range(start, end, READ_AHEAD_BYTES):
        _advise(each, min(each + READ_AHEAD_BYTES, end), mmap.MADV_WILLNEED)


def populate(*mapped: torch.Tensor) -> None:
    """Map all pages of tensors that are parts of files, before they are read; fault after fault takes twice the time.

    It waits for those that are not in the page cache.
    """
    for tensor in mapped:
        _advise(*_pages(tensor), MADV_POPULATE_READ)


def release(*mapped: torch.Tensor) -> None:
    """Let go of tensors that are parts of files, before what is still to be read.

    The kernel keeps longest what was read several times, and here that is all used up.
    """
    for tensor in mapped:
        _advise(*_pages(tensor), MADV_COLD)


@contextlib.contextmanager
def written_behind(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, and have the kernel put on the disk what it is given meanwhile; it would wait for an fsync.

    A thread of its own asks for it: the question takes until the disk has a free place.
    """
    closed = threading.Event()

    def write(descriptor: int) -> None:
        while not closed.wait(WRITE_EVERY_S):
            everything = ctypes.c_int64(0), ctypes.c_int64(0)
            LIBC.sync_file_range(descriptor, *everything, SYNC_FILE_RANGE_WRITE)

    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        pool.submit(write, file.fileno())
        try:
            yield file
        finally:
            closed.set()


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """(address of the tensor's first page, address behind its last number)."""
    return tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, tensor.data_ptr() + tensor.nbytes


def _advise(start: int, end: int, advice: int) -> None:
    LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
