"""The folder that a conversion writes: kept, replaced or refused."""

from __future__ import annotations

from pathlib import Path

from megatron_octo import lineage, rundir
from megatron_octo.errors import BadInput


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
