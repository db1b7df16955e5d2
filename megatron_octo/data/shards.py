"""Encoded documents -> numbered shards with what belongs beside them, one open at a time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, Any

from megatron_octo.data.encode import Documents
from megatron_octo.data.indexed import IndexedWriter, TokenType
from megatron_octo.data.manifest import ShardRecord

LOSS, IDS = ".loss", ".ids"
SHARD_FILES = (".bin", ".idx", LOSS, IDS)


class ShardWriter:
    """Writes NAME00000, NAME00001, ... in a folder; a shard is there once `close` has returned its record."""

    def __init__(self, folder: Path, name: str, dtype: TokenType, *, number: int) -> None:
        """Begin with shard `number`."""
        self._folder, self._name, self._dtype, self._number = folder, name, dtype, number
        self._writer: IndexedWriter | None = None
        self._beside: dict[str, _Beside] = {}

    @property
    def tokens(self) -> int:
        """Tokens in the open shard."""
        return self._writer.tokens if self._writer else 0

    def add(self, documents: Documents) -> None:
        """Append documents to the open shard, opening one if there is none."""
        if not len(documents.lengths):
            return
        if self._writer is None:
            self._writer = IndexedWriter(self._prefix, self._dtype)
        self._writer.add_many(documents.ids, documents.lengths)
        if documents.marks is not None:
            self._add_beside(LOSS, documents.marks.tobytes())
        if documents.names is not None:
            self._add_beside(IDS, b"".join(name + b"\n" for name in documents.names))

    def close(self) -> ShardRecord | None:
        """Finish the open shard and return its record; None if there is none."""
        if self._writer is None:
            return None
        with self._writer:
            pass
        hashes = {ending: each.close() for ending, each in self._beside.items()}
        record = ShardRecord(
            prefix=self._prefix.name,
            documents=self._writer.documents,
            tokens=self._writer.tokens,
            bin_sha256=self._writer.bin_sha256,
            idx_sha256=self._writer.idx_sha256,
            loss_sha256=hashes.get(LOSS),
            ids_sha256=hashes.get(IDS),
        )
        self._writer, self._beside, self._number = None, {}, self._number + 1
        return record

    @property
    def _prefix(self) -> Path:
        return self._folder / f"{self._name}{self._number:05d}"

    def _add_beside(self, ending: str, data: bytes) -> None:
        if ending not in self._beside:
            self._beside[ending] = _Beside(self._prefix.with_name(f"{self._prefix.name}{ending}"))
        self._beside[ending].write(data)


class _Beside:
    """A file beside a shard, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file: IO[Any] = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()
