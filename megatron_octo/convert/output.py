"""The folder that a conversion writes: kept, replaced or refused; and one that a killed attempt began, gone on with."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_octo import console, lineage, rundir
from megatron_octo.errors import BadInput

PLAN = "plan.json"


def finished(output: Path, kind: lineage.Kind, *, overwrite: bool) -> lineage.Lineage | None:
    """The lineage of a finished `output` that stays; None where there is nothing, or `overwrite` replaces it.

    Raises:
        BadInput: `output` holds something that no conversion of this `kind` wrote.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    found = lineage.read_if_present(output) if rundir.is_done(output) else None
    if found is None or found.kind != kind:
        raise BadInput(
            f"output {output} exists and holds something else", fix="give a folder that is empty or not there yet"
        )
    return None if overwrite else found


def check_room(output: Path, num_bytes: int) -> None:
    """Refuse a disk that cannot hold the weights.

    Raises:
        BadInput: so it is.
    """
    free = rundir.free_bytes(output)
    if free < num_bytes:
        raise BadInput(
            f"the weights take {console.size(num_bytes)} on the disk of {output}, and {console.size(free)} are free",
            fix="free some, or choose another folder",
        )


def partial_folder(output: Path) -> Path:
    """Where `continued` prepares `output`."""
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def continued(output: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder that becomes `output`, marked DONE, when the block ends without an error.

    It holds what an attempt with the same `plan` left when it was killed; after an error nothing of it stays.

    Raises:
        BadInput: another process is at it.
    """
    partial = partial_folder(output)
    rundir.clear_stale(output)
    with rundir.lock(partial):
        same = (partial / PLAN).exists() and rundir.read_json(partial / PLAN) == plan
        for path in partial.iterdir():
            if path.name != rundir.LOCK and not (same and path.suffix != ".tmp"):
                path.unlink()
        rundir.write_json(partial / PLAN, plan)
        try:
            yield partial
        except Exception:
            shutil.rmtree(partial)
            raise
        (partial / PLAN).unlink()
        (partial / rundir.LOCK).unlink()
        rundir.mark_done(partial)
        rundir.publish(partial, output)
