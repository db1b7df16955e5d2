"""The checksums of a finished folder: SHA256SUMS, as sha256sum writes it (`sha256sum -c` reads it), named by DONE.

A byte that changes in any file of the folder, in the list or in DONE is found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from megatron_octo.rundir import DONE, is_done, mark_done, sha256, write_atomic

FILE = "SHA256SUMS"
THREADS = 4


def seal(folder: Path, known: Mapping[str, str]) -> None:
    """Write the checksums of all files of `folder`, then DONE. Call it last.

    `known` has the SHA-256 of files that were read already, by name.
    """
    names = sorted(path.name for path in folder.iterdir())
    lines = "".join(f"{known.get(name) or sha256(folder / name)}  {name}\n" for name in names)
    write_atomic(folder / FILE, lines)
    mark_done(folder, note=hashlib.sha256(lines.encode()).hexdigest())


def is_sealed(folder: Path) -> bool:
    """Whether `folder` was sealed, whichever of the two files of that is left."""
    return (folder / FILE).exists() or (is_done(folder) and (folder / DONE).stat().st_size > 0)


def faults(folder: Path, *, only: str = "*", part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a sealed `folder`, a line a file; reads the files named like `only`, writes nothing.

    Several callers may share the work: each of the `parts` reads the files of its own `part`.
    """
    if not is_done(folder):
        return [f"it has no {DONE}"]
    if not (folder / FILE).is_file():
        return [f"it has no {FILE}"]
    content = (folder / FILE).read_bytes()
    if (folder / DONE).read_bytes() != f"{hashlib.sha256(content).hexdigest()}\n".encode():
        return [f"{FILE} is not the one that {DONE} names"]
    lines = [line.split("  ", 1) for line in content.decode().splitlines()]
    lines = [line for line in lines if fnmatch(line[1], only)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda line: _fault(folder / line[1], line[0]), lines[part::parts])
        return [fault for fault in found if fault]


def _fault(path: Path, wanted: str) -> str:
    try:
        changed = sha256(path) != wanted
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return f"{path.name} is not as it was written: its checksum differs" if changed else ""
