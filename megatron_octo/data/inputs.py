"""The files of a source, one after the other: those of this machine, or those of the Hub, fetched when needed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from megatron_octo import console
from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.hub import (
    HubFile,
    check_access,
    downloads_folder,
    fetch,
    missing_bytes,
    release,
)
from megatron_octo.data.hub_listing import plan_downloads
from megatron_octo.data.manifest import FileRecord, FileState
from megatron_octo.data.read import LINES, input_files
from megatron_octo.data.shards import LOSS
from megatron_octo.errors import BadInput
from megatron_octo.rundir import free_bytes

AT_ONCE = 2  # one is read, the next is fetched
# Ids of four bytes take about what their text takes. Packed files hold about twice their size in text (FineMath-4plus:
# 18.4 GB of parquet, 39.1 GB of text), though only a part of it may be read.
TEXT_PER_PACKED_BYTE = 2.0


class Inputs(Protocol):
    """Files to read in order."""

    states: tuple[FileState, ...]
    hub: tuple[HubFile, ...]
    """The same as the Hub lists them; empty for files of this machine."""

    def open(self, index: int) -> Path:
        """A file, there to be read."""

    def known(self, index: int) -> FileRecord | None:
        """What the manifest says of a file whose hash need not be computed."""

    def close(self, index: int) -> None:
        """The file has been read to its end.

        Raises:
            BadInput: it changed meanwhile.
        """


class LocalFiles:
    """Files of this machine."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.hub: tuple[HubFile, ...] = ()
        self.states = tuple(map(file_state, paths))

    def open(self, index: int) -> Path:
        """See Inputs."""
        return self._paths[index]

    def known(self, index: int) -> FileRecord | None:
        """See Inputs."""
        return None

    def close(self, index: int) -> None:
        """See Inputs."""
        path = self._paths[index]
        if not path.exists() or file_state(path) != self.states[index]:
            raise BadInput(
                f"{path} changed while it was read", fix="let what writes it end; delete the output and begin again"
            )


class HubFiles:
    """Files of the Hub: the next is fetched while one is read, and one that has been read is deleted."""

    def __init__(self, files: Sequence[HubFile], folder: Path) -> None:
        self.hub, self._folder = tuple(files), folder
        self._fetcher = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[Path]] = {}
        self.states = tuple(
            FileState(path=Path(_name(each)), size_bytes=each.size_bytes, modified_ns=0) for each in files
        )

    def open(self, index: int) -> Path:
        """See Inputs."""
        for each in range(index, min(index + AT_ONCE, len(self.hub))):
            if each not in self._coming:
                self._coming[each] = self._fetcher.submit(fetch, self.hub[each], self._folder)
        return self._coming[index].result()

    def known(self, index: int) -> FileRecord | None:
        """See Inputs."""
        sha256 = self.hub[index].sha256
        return FileRecord(file=self.states[index], sha256=sha256) if sha256 else None

    def close(self, index: int) -> None:
        """See Inputs."""
        del self._coming[index]
        release(self.hub[index], self._folder)


def find_inputs(
    config: PrepareConfig, begun: Sequence[HubFile] = (), first: int = 0, *, token_bytes: int = 4
) -> Inputs:
    """The files of a source; nothing is fetched yet.

    Args:
        begun: of the Hub's files, those that an earlier attempt read: the same are read on.
        first: index of the first that is still to be read.
        token_bytes: length of an id in the shards.

    Raises:
        BadInput: there are none, they cannot be read by us, or the disk lacks room for them.
    """
    if config.input is not None:
        local = LocalFiles(input_files(config.input))
        _check_disk(config, local.states, token_bytes)
        return local
    assert config.hub is not None
    files = begun or plan_downloads(config.hub)
    check_access(config, files[first:])
    fetched = HubFiles(files, downloads_folder(config))
    _check_disk(config, fetched.states, token_bytes, files[first:])
    return fetched


def _check_disk(
    config: PrepareConfig, states: Sequence[FileState], token_bytes: int, downloads: Sequence[HubFile] = ()
) -> None:
    """Refuse a source whose tokens, and downloads, the disk could not hold; what is there already needs no room.

    Raises:
        BadInput: so it is.
    """
    per_token = token_bytes + config.mark_answers
    if config.facts and config.facts.expected_tokens:
        needed = config.facts.expected_tokens * per_token
        whence = f"{config.facts.expected_tokens:,} of {per_token} bytes, as facts.expected_tokens says"
    else:
        text = sum(each.size_bytes * (1 if each.path.suffix in LINES else TEXT_PER_PACKED_BYTE) for each in states)
        needed, whence = round(text * per_token / 4), "guessed from the files' length"
    written = sum(path.stat().st_size for ending in (".bin", LOSS) for path in config.output.glob(f"*{ending}"))
    tokens = max(0, needed - written)
    folder = downloads_folder(config)
    fetched = sum(heapq.nlargest(AT_ONCE, (missing_bytes(each, folder) for each in downloads)))
    free = free_bytes(config.output)
    if free < fetched + tokens:
        which = "the files" if len(downloads) <= AT_ONCE else f"the largest {AT_ONCE} of {len(downloads):,} files"
        to_download = f"{console.size(fetched)} for {which} to download, " if downloads else ""
        raise BadInput(
            f"source {config.name} needs {console.size(fetched + tokens)} on the disk of {config.output}, and "
            f"{console.size(free)} are free: {to_download}{console.size(tokens)} for the tokens ({whence})",
            fix="free some or choose another output; or state the right facts.expected_tokens",
        )


def file_state(path: Path) -> FileState:
    """A file of this machine as it is now."""
    stat = path.stat()
    return FileState(path=path, size_bytes=stat.st_size, modified_ns=stat.st_mtime_ns)


def _name(file: HubFile) -> str:
    return f"datasets/{file.repository}@{file.commit}/{file.path}"
