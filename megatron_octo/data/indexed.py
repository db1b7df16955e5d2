"""Megatron-Core's IndexedDataset on disk, PREFIX.bin and PREFIX.idx, without loading torch.

The bytes are those of `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` with one sequence a document, and
none for a document without ids. Training reads them with Megatron's own IndexedDataset.

    .bin  token ids, one document after the other
    .idx  magic, version, dtype code, counts; int32 lengths; int64 byte offsets; int64 document bounds
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from megatron_octo.errors import BadInput

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
VERSION = 1
CODES = {"int32": 4, "uint16": 8}
FIRST_INT32_VOCAB = 65_500  # DType.optimal_dtype's border

TokenType = Literal["uint16", "int32"]


def token_type(vocab_size: int) -> TokenType:
    """The number format of ids below `vocab_size`, as Megatron chooses it."""
    return "uint16" if vocab_size < FIRST_INT32_VOCAB else "int32"


class IndexedWriter:
    """Writes one shard; use it as a context. The index is written when the block ends without an error."""

    def __init__(self, prefix: Path, dtype: TokenType) -> None:
        self._prefix, self._dtype = prefix, np.dtype(dtype)
        self._lengths = array("i")
        self._bin = prefix.with_name(f"{prefix.name}.bin").open("wb")
        self._digest = hashlib.sha256()
        self.tokens = 0
        self.idx_sha256 = ""
        """Hash of the .idx file, once it is written."""

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add(self, ids: Sequence[int]) -> None:
        """Append one document."""
        self.add_many(np.array(ids, dtype=self._dtype), np.array([len(ids)], dtype=np.int32))

    def add_many(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their ids one after the other, in the shard's number format, and their int32 lengths."""
        data = ids.data.cast("B") if ids.size else b""
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.frombytes(lengths.tobytes())
        self.tokens += ids.size

    @property
    def bin_sha256(self) -> str:
        """Hash of the .bin file so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._bin.flush()
            os.fsync(self._bin.fileno())
            self._write_index()
        self._bin.close()

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        digest = hashlib.sha256()
        with self._prefix.with_name(f"{self._prefix.name}.idx").open("wb") as file:
            for part in index_parts(lengths, self._dtype):
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        self.idx_sha256 = digest.hexdigest()


def index_parts(documents: np.ndarray, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """What the .idx of documents of such int32 lengths holds: header, lengths, byte offsets, document bounds.

    A document without ids has bounds, but no length of its own.
    """
    lengths = documents[documents > 0]
    yield HEADER.pack(MAGIC, VERSION, CODES[dtype.name], len(lengths), len(documents) + 1)
    yield lengths.tobytes()
    zero = np.zeros(1, np.int64)
    yield np.concatenate([zero, np.cumsum(lengths, dtype=np.int64) * dtype.itemsize])[: len(lengths)].tobytes()
    yield np.concatenate([zero, np.cumsum(documents > 0, dtype=np.int64)]).tobytes()


def read_lengths(prefix: Path, count: int | None = None) -> tuple[np.ndarray, np.dtype[Any]]:
    """(int32 tokens of each document of a shard, or of the first `count`; the number format of its ids).

    Read, not mapped: they lie unaligned in the .idx, and numpy copies what does.

    Raises:
        BadInput: the index is not one of these.
    """
    index = prefix.with_name(f"{prefix.name}.idx")
    with index.open("rb") as file:
        head = file.read(HEADER.size)
        magic, version, code, documents, _ = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0, 0, 0)
        if (magic, version) != (MAGIC, VERSION) or code not in CODES.values():
            raise BadInput(f"{index} is no index of Megatron's", fix="prepare the source again")
        lengths = np.fromfile(file, np.int32, documents if count is None else min(count, documents))
    return lengths, np.dtype({code: name for name, code in CODES.items()}[code])


def read_documents(prefix: Path, count: int) -> list[list[int]]:
    """The ids of a shard's first `count` documents that have any.

    Raises:
        BadInput: the index is not one of these.
    """
    lengths, dtype = read_lengths(prefix, count)
    ids = np.fromfile(prefix.with_name(f"{prefix.name}.bin"), dtype, int(lengths.sum()))
    ends = np.cumsum(lengths)
    return [ids[end - length : end].tolist() for length, end in zip(lengths, ends, strict=True)]
