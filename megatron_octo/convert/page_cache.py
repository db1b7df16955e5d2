"""What the kernel is told of files much larger than memory: what will be read, what is done with, what to write now."""

from __future__ import annotations

import ctypes
import mmap
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIBC = ctypes.CDLL(None)
MADV_COLD = 20  # linux/mman.h; Python's mmap has no name for it
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
READ_AHEAD_BYTES = 128 << 10
"""The kernel reads no more at one request than a disk's own read-ahead, of which this is the usual one."""


def read_ahead(mapped: torch.Tensor) -> None:
    """Begin to read a tensor that is a part of a file; by one page fault after another a disk gives a third."""
    start, end = _pages(mapped)
    for each in range(start, end, READ_AHEAD_BYTES):
        _advise(each, min(each + READ_AHEAD_BYTES, end), mmap.MADV_WILLNEED)


def release(*mapped: torch.Tensor) -> None:
    """Let go of tensors that are parts of files, before what is still to be read.

    The kernel keeps longest what was read several times, and here that is all used up.
    """
    for tensor in mapped:
        _advise(*_pages(tensor), MADV_COLD)


def start_writing(file: IO[bytes]) -> None:
    """Have the kernel begin to put on the disk what `file` holds; left alone it lets the disk idle until an fsync."""
    file.flush()
    everything = ctypes.c_int64(0), ctypes.c_int64(0)
    LIBC.sync_file_range(file.fileno(), *everything, SYNC_FILE_RANGE_WRITE)


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """(address of the tensor's first page, address behind its last number)."""
    return tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, tensor.data_ptr() + tensor.nbytes


def _advise(start: int, end: int, advice: int) -> None:
    LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
