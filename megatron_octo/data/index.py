"""The sample index of one shard: which documents, in which order, cut where. Bit for bit megatron-core's own.

`GPTDataset._build_document_sample_shuffle_indices` of megatron-core 0.19.2 says what is in it; this builds the same
arrays in less time and memory, and keeps them so that no reader ever takes a half-built index for a whole one.

    document_index  int32 [epochs * documents]  documents in reading order
    sample_index    int32 [samples + 1, 2]      where a sample begins: entry of document_index, token in that document
    shuffle_index   uint32 [samples]            samples in training order
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_octo.console import duration, logger
from megatron_octo.data.indexed import read_lengths
from megatron_octo.errors import BadInput, OctoError

Array = np.ndarray[Any, Any]

SEPARATE_BELOW = 0.80  # megatron's: a last epoch that is used less than this is not mixed with those before it
CHUNK = 1 << 14  # documents at a time: what is gathered for them stays in the processor's cache
NUMPY_SHUFFLES_BELOW = 1 << 24  # entries; compiling the faster loop takes a second
DRAWN_WORDS = 1 << 16
SWAPPED_AT_ONCE = 1 << 11
SAID_FROM = 10_000_000  # entries of document_index; fewer take about a second
VISIBLE_WITHIN_S = 120.0  # what a network file system may take to show one node the files of another
LOCK = ".index.lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOrder:
    """What to build an index of, and how."""

    prefix: Path
    """The shard, without .bin and .idx."""
    documents: Array
    """Which of its documents, int32 [documents]."""
    num_samples: int | None
    """At least so many; documents are read again, in another order, until there are. None for one epoch."""
    seq_length: int
    """Tokens in a sample."""
    seed: int
    """Of both shuffles."""
    extra_token: bool = True
    """Whether a sample is read with the token after it, its last label."""
    drop_last_partial: bool = True
    """Whether the tokens after the last whole sample are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFiles:
    """Where an index is kept: the names are megatron's."""

    folder: Path
    name: str
    """What the files' names begin with: it identifies the index among all others in `folder`."""

    @property
    def arrays(self) -> tuple[Path, Path, Path]:
        """document_index, sample_index, shuffle_index."""
        document, sample, shuffle = (
            self.folder / f"{self.name}-{each}_index.npy" for each in ("document", "sample", "shuffle")
        )
        return document, sample, shuffle

    @property
    def description(self) -> Path:
        """Written last: where it is, the index is whole."""
        return self.folder / f"{self.name}-description.txt"

    def whole(self) -> bool:
        """Whether the index is built, to its end."""
        return all(path.is_file() for path in (self.description, *self.arrays))

    def load(self) -> tuple[Array, Array, Array]:
        """The arrays, mapped: the processes of a machine share one copy in memory."""
        document, sample, shuffle = (np.load(path, mmap_mode="r") for path in self.arrays)
        return document, sample, shuffle


def open_index(files: IndexFiles, order: IndexOrder, description: str, *, builds: bool) -> tuple[Array, Array, Array]:
    """document_index, sample_index and shuffle_index, from `files`; built first if they are not there.

    One process builds: others that come meanwhile wait for it and say so. With `builds` False (all ranks but 0)
    nothing is built: the index must be there, or appear soon.

    Raises:
        BadInput: the shard has no tokens, or its .idx is none.
        OctoError: `builds` is False and there is no index.
    """
    if files.whole():
        return files.load()
    if not builds:
        _await(files)
        return files.load()
    files.folder.mkdir(parents=True, exist_ok=True)
    with _only_builder(files.folder, order.prefix):
        if not files.whole():
            for stale in files.folder.glob(".*-*.tmp"):  # of a killed build: who holds the lock is alone
                stale.unlink()
            _build(files, order, description)
    return files.load()


def _build(files: IndexFiles, order: IndexOrder, description: str) -> None:
    log, start = logger(__name__), time.monotonic()
    documents, samples, shuffled = files.arrays
    random = np.random.RandomState(order.seed)

    # The lengths are read twice, and the document index back from its file: memory holds two of the three arrays
    # that have an entry a document (these and order.documents), never all.
    tokens = _sum_of_lengths(read_lengths(order.prefix)[0], order.documents)
    epochs, first_samples = _epochs(tokens, order)
    size = epochs * len(order.documents)
    what = f"{order.prefix}: {len(order.documents):,} documents, {tokens:,} tokens, {epochs:,} epochs"
    if size >= SAID_FROM:
        log.info("building the sample index of %s", what)
    _write(documents, _document_index(order.documents, epochs, random, separate_last=first_samples is not None))
    total = _num_samples(epochs * tokens, order)
    with documents.open("rb") as file:
        _write(samples, _sample_index(read_lengths(order.prefix)[0], file, size, total, order))
    _write(shuffled, _shuffle_index(total if first_samples is None else first_samples, total, random))
    _write(files.description, description.encode())
    log.info("built the sample index of %s, %s samples, in %s", what, f"{total:,}", duration(time.monotonic() - start))


def _sum_of_lengths(lengths: Array, documents: Array) -> int:
    return sum(
        int(lengths.take(documents[start : start + CHUNK]).sum(dtype=np.int64))
        for start in range(0, len(documents), CHUNK)
    )


def _epochs(tokens: int, order: IndexOrder) -> tuple[int, int | None]:
    """How often the documents are read; and, if the last time is shuffled by itself, the samples before it."""
    if tokens == 0:
        raise BadInput(f"{order.prefix} holds no tokens", fix="leave it out, or prepare it from other text")
    if order.num_samples is None:
        return 1, None
    epochs = max(1, -(-(order.num_samples * order.seq_length + order.extra_token) // tokens))
    if epochs == 1:
        return 1, None
    before = ((epochs - 1) * tokens - order.extra_token) // order.seq_length
    an_epoch = (tokens - order.extra_token) // order.seq_length
    return epochs, before if order.num_samples - before < int(SEPARATE_BELOW * an_epoch) else None


def _document_index(documents: Array, epochs: int, random: np.random.RandomState, *, separate_last: bool) -> Array:
    index = np.empty(epochs * len(documents), np.int32)
    index.reshape(epochs, -1)[:] = documents
    last = len(documents) if separate_last else 0
    shuffle(index[: len(index) - last], random)
    if last:
        shuffle(index[-last:], random)
    return index


def _num_samples(tokens: int, order: IndexOrder) -> int:
    if order.drop_last_partial:
        return max(0, tokens - order.extra_token) // order.seq_length
    # megatron rounds to single precision here, which from 2^24 tokens on may cut off or add samples
    return int(np.ceil(np.float32(tokens - order.extra_token) / np.float32(order.seq_length)))


def _sample_index(lengths: Array, documents: BinaryIO, size: int, num_samples: int, order: IndexOrder) -> Array:
    """Cut the stream of all documents, read from the .npy file `documents`, `size` entries.

    Sample k ends, and the next begins, in the document that holds token k * seq_length of the stream, the extra one;
    without an extra token in the one that holds the token before it, maybe at its very end.
    """
    documents.seek(-size * np.dtype(np.int32).itemsize, os.SEEK_END)  # behind the header
    index = np.empty((num_samples + 1, 2), np.int32 if size <= np.iinfo(np.int32).max else np.int64)
    index[0] = 0
    done, seen, back = 1, 0, 0 if order.extra_token else 1
    chunk = np.zeros(1, np.int32)
    for start in range(0, size, CHUNK):
        chunk = np.fromfile(documents, dtype=np.int32, count=min(CHUNK, size - start))
        length = lengths.take(chunk)
        ends = np.cumsum(length, dtype=np.int64) + seen
        seen = int(ends[-1])
        until = min((seen - 1 + back) // order.seq_length, num_samples) + 1
        tokens = np.arange(done, until, dtype=np.int64) * order.seq_length
        where = np.searchsorted(ends, tokens - back, side="right")
        index[done:until, 0] = start + where
        index[done:until, 1] = tokens - ends[where] + length[where]
        done = max(done, until)
    index[done:] = size - 1, lengths[chunk[-1]] - order.extra_token  # partial: to the end of the last document
    return index


def _shuffle_index(first: int, total: int, random: np.random.RandomState) -> Array:
    """Samples in training order; those from `first` on stay behind."""
    index = np.arange(total, dtype=np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64)
    shuffle(index[:first], random)
    if first < total:
        shuffle(index[first:], random)
    return index


def shuffle(values: Array, random: np.random.RandomState) -> None:
    """`random.shuffle(values)` for one axis, three times as fast: same order, same state of `random` afterwards.

    numpy draws a number, waits for the memory it points at, and swaps; this draws some thousand numbers, loads all
    that they point at together, and swaps then.
    """
    if not NUMPY_SHUFFLES_BELOW <= len(values) <= 1 << 32:  # beyond, numpy draws 64 bits
        random.shuffle(values)
        return
    swap, targets = _compiled_swap(), np.empty(SWAPPED_AT_ONCE, np.uint32)
    left, used = len(values) - 1, 0
    while left > 0:
        state = random.get_state(legacy=False)
        left, used, _ = swap(values, left, random.randint(0, 1 << 32, DRAWN_WORDS, np.uint32), targets)
    random.set_state(state)  # to before the last words, of which some were not used
    random.randint(0, 1 << 32, used, np.uint32)


@functools.cache
def _compiled_swap() -> Any:
    from numba import njit  # type: ignore[import-untyped]

    return njit(nogil=True)(_swap)


def _swap(values: Array, left: int, words: Array, targets: Array) -> tuple[int, int, int]:
    """Fisher-Yates from the top, as numpy's `random_interval` draws: the low bits of a word, again if too high.

    Goes on from entry `left` while there are words. Returns where it stopped, the words used, and a number that says
    nothing: it keeps the compiler from leaving out the loads.
    """
    used, loaded = 0, 0
    while left > 0 and used < len(words):
        bound = 1
        while 2 * bound <= left:
            bound *= 2
        mask = np.uint32(2 * bound - 1)
        top, count = left, 0
        while used < len(words) and count < len(targets) and left >= bound:
            target = words[used] & mask
            used += 1
            targets[count] = target
            accepted = int(target <= left)  # no branch: it would be mispredicted a third of the time
            count += accepted
            left -= accepted
        for each in range(count):
            loaded ^= values[targets[each]]
        for each in range(count):
            value = values[top - each]
            values[top - each] = values[targets[each]]
            values[targets[each]] = value
    return left, used, loaded


def _write(path: Path, content: Array | bytes) -> None:
    """Write a file of the index under a temporary name, and give it its own when it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:  # not np.save: on a full disk it may lose the last bytes and not say so
                header: Any = np.lib.format
                header.write_array_header_1_0(file, header.header_data_from_array_1_0(content))
                file.write(content.data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk should not stay full
        raise
    temporary.replace(path)


@contextlib.contextmanager
def _only_builder(folder: Path, prefix: Path) -> Iterator[None]:
    """Wait until no other process builds in `folder`, and say so; the operating system ends a dead one's turn."""
    log, start = logger(__name__), time.monotonic()
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            log.info("waiting for %s to build the sample index of %s", file.read() or "another process", prefix)
            fcntl.flock(file, fcntl.LOCK_EX)
            log.info("waited %s for the sample index of %s", duration(time.monotonic() - start), prefix)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _await(files: IndexFiles) -> None:
    """Wait for files that another node wrote a moment ago."""
    start = time.monotonic()
    while not files.whole():
        if time.monotonic() - start > VISIBLE_WITHIN_S:
            raise OctoError(
                f"rank 0 built the sample index, but {files.description} is not on {socket.gethostname()}",
                fix="put OCTO_RUNS on a file system that all nodes share",
            )
        time.sleep(0.5)
