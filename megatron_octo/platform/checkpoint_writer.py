"""Keeps megatron's checkpoint writer inside the training process: a thread of ours writes, from a copy.

Megatron forks a process for each save. It would outlive a killed rank, still writing and still holding the run's lock,
and its results queue belongs to one more process, which imports torch again, on every rank.
"""

from __future__ import annotations

import queue
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest


def install() -> None:
    """Give each save a results queue of this process. A second call changes nothing."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": queue.Queue()


def copy_to_host(request: AsyncRequest) -> None:
    """Put copies on the CPU in the place of the tensors that `request` will write: training changes those."""
    for _, _, (_, tensors) in request.async_fn_args[1] if request.async_fn else ():
        tensors[:] = [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]


def write(request: AsyncRequest) -> list[Path]:
    """Do what `request` asks for on this rank: write its files, all the way to the disk; returns them.

    Raises:
        OSError: a file cannot be written; megatron's own caller would log it and go on.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    if request.async_fn is None:  # other ranks write all that this one holds
        return []
    (transforms, _), (_, buckets, results) = request.async_fn.args, request.async_fn_args
    written = {}
    for number, bucket in enumerate(buckets):
        _, outcome = FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, None, None, True)
        if isinstance(outcome, Exception):
            raise _first(outcome)
        written[number] = outcome
    results.put(written)
    return [Path(path) for path, _, _ in buckets]


def _first(error: BaseException) -> BaseException:
    """The error that led to `error`: torch's archive says of a full disk only that a position is unexpected."""
    while error.__context__ is not None:
        error = error.__context__
    return error
