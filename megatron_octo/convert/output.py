"""What a conversion writes: a folder that is kept, replaced or refused, or gone on with after a kill; and its files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_octo import console, lineage, rundir
from megatron_octo.convert.sums import sha256
from megatron_octo.errors import BadInput

PLAN = "plan.json"
UNFINISHED = "unfinished"
MAX_FILE_BYTES = 2_000_000_000
"""Largest weight file written: small enough to be in the page cache still when it is read back."""
BESIDE_BYTES = 64 << 20
"""Room for what is not weights: headers, an index with a line a tensor, tokenizer, licence, records."""


def finished(output: Path, kind: lineage.Kind, *, overwrite: bool) -> lineage.Lineage | None:
    """The lineage of a finished `output` that stays; None where there is nothing, or `overwrite` replaces it.

    Raises:
        BadInput: `output` holds something that no conversion of this `kind` wrote, or lies below a file.
    """
    try:
        place = output.resolve()
        above = next(each for each in (*place.parents, place) if each.exists())
    except (OSError, RuntimeError) as error:  # links that go round in circles
        raise BadInput(f"output {output} leads nowhere: {error}", fix="give another folder") from None
    if not above.is_dir():
        raise BadInput(f"{above} is a file: {output} cannot lie below it", fix="give another folder")
    if place.is_mount():  # it cannot be moved to its name at the end
        raise BadInput(f"output {output} is a disk of its own", fix="give a folder in it")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    found = lineage.read_if_present(output) if rundir.is_done(output) else None
    if found is None or found.kind != kind:
        raise BadInput(
            f"output {output} exists and holds something else", fix="give a folder that is empty or not there yet"
        )
    return None if overwrite else found


def check_room(output: Path, num_bytes: int) -> None:
    """Refuse a disk that cannot hold `num_bytes` of weights and what goes with them.

    What a killed attempt left is kept or makes room.

    Raises:
        BadInput: so it is.
    """
    left = sum(path.stat().st_size for path in _partial_folder(output).rglob("*"))
    free = rundir.free_bytes(output.resolve()) + left
    needed = num_bytes + BESIDE_BYTES
    if free < needed:
        raise BadInput(
            f"the result takes up to {console.size(needed)} on the disk of {output}, and {console.size(free)} are free",
            fix="free some, or choose another folder",
        )


@contextlib.contextmanager
def continued(output: Path, plan: dict[str, Any], kept: Sequence[str]) -> Iterator[Path]:
    """Yield a folder that becomes `output`, marked DONE, when the block ends without an error.

    It holds the files of the patterns `kept` that an attempt with the same `plan` left when it was killed; after an
    error nothing of it stays.

    Raises:
        BadInput: another process is at it.
    """
    output = output.resolve()  # a link stays one
    partial = _partial_folder(output)
    rundir.clear_stale(output)
    with rundir.lock(partial):
        same = (partial / PLAN).exists() and rundir.read_json(partial / PLAN) == plan
        shutil.rmtree(partial / UNFINISHED, ignore_errors=True)
        for path in partial.iterdir():
            if path.name != rundir.LOCK and not (same and any(map(path.match, kept))):
                path.unlink()
        rundir.write_json(partial / PLAN, plan)
        try:
            yield partial
        except Exception:
            shutil.rmtree(partial)
            raise
        rundir.mark_done(partial)
        (partial / rundir.LOCK).unlink()
        (partial / PLAN).unlink()  # a kill before this one loses nothing
        rundir.publish(partial, output)


def _partial_folder(output: Path) -> Path:
    output = output.resolve()
    return output.with_name(f".{output.name}.partial")


def into_files[T](items: Iterable[T], num_bytes: Callable[[T], int], max_file_bytes: int) -> list[list[T]]:
    """Items in their order, as many to a file as `max_file_bytes` hold; one alone may take more."""
    files: list[list[T]] = []
    room = 0
    for item in items:
        size = num_bytes(item)
        if not files or size > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(item)
        room -= size
    return files


def write_files(
    folder: Path, names: Sequence[str], write: Callable[[Path], None], check: Callable[[Path], None]
) -> str:
    """Write files into `folder`, one after the other; hash and check each while the next is written.

    `write` and `check` are given the path in a folder beside, of which a file leaves once it is checked and on the
    disk. One that is in `folder` already is whole, and only checked. Returns one SHA-256 over all.
    """
    unfinished = folder / UNFINISHED
    unfinished.mkdir()

    def end(path: Path) -> str:
        digest = sha256(path)
        check(path)
        if path.parent == unfinished:
            with path.open("rb") as file:  # much of it is on the disk by now
                os.fsync(file.fileno())
            path.replace(folder / path.name)
        return digest

    sums: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1) as pool:
        for name in names:
            path = folder / name
            if not path.exists():
                path = unfinished / name
                write(path)
            for before in sums.values():
                before.result()  # its error ends the work; what is checked late has left the page cache
            sums[name] = pool.submit(end, path)
        digest = rundir.sha256_files({name: each.result() for name, each in sums.items()})
    unfinished.rmdir()
    return digest
