"""Is this node fit for a job: GPUs, their errors and memory, shared memory, disk. A line a node, no torch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_octo.errors import OctoError

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_BYTES = 1 << 30  # NCCL's and the data loader's
LEAST_DISK_BYTES = 2 << 30
MOST_GPU_MIB_IN_USE = 1024  # of a GPU nobody else should be on
QUERY = ("index", "memory.used", "ecc.errors.uncorrected.volatile.total")
FINE = {
    "gpu_recovery_action": ("None",),
    "remapped_rows.pending": ("0", "No"),
    "remapped_rows.failure": ("0", "No"),
}
"""What a driver says of a GPU that needs no reset or repair after an error (Xid). Older drivers do not know all."""
UNKNOWN = ("N/A", "Not Supported")
NVIDIA_SMI_TIMEOUT_S = 120  # a GPU that fell off the bus lets it hang
COMMAND_TIMEOUT_S = 900


def node_name() -> str:
    """As Slurm calls this node."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def faults(*, num_gpus: int, runs: Path, command: str = "") -> list[str]:
    """What is wrong with this node, empty if nothing is.

    Args:
        num_gpus: how many it must have; 0 asks nothing of them.
        runs: the folder that runs are written to.
        command: a check of the site's own; the node is bad if it fails.
    """
    found = [*_gpu_faults(num_gpus)] if num_gpus else []
    if (free := shutil.disk_usage(SHARED_MEMORY).free) < LEAST_SHARED_BYTES:
        found.append(f"{free:,} bytes left in {SHARED_MEMORY}")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        probe = runs / f".preflight-{node_name()}"
        probe.write_text("")
        probe.unlink()
        if (free := shutil.disk_usage(runs).free) < LEAST_DISK_BYTES:
            found.append(f"{free / 2**30:.1f} GiB left on the disk of {runs}")
    except OSError as error:
        found.append(f"{runs} cannot be written: {error.strerror}")
    if command and (failed := _failure(command)):
        found.append(failed)
    return found


def _gpu_faults(num_gpus: int) -> Iterator[str]:
    try:
        rows = _gpus()
    except (OSError, OctoError, subprocess.SubprocessError, ValueError) as error:
        yield f"nvidia-smi does not answer: {error}"
        return
    if len(rows) < num_gpus:
        yield f"{len(rows)} of {num_gpus} GPUs"
    for field, fine in FINE.items():
        for gpu, value in _values("index", field):
            if value not in fine and not any(each in value for each in UNKNOWN):
                yield f"GPU {gpu}: {field} is {value}: after an error it asks for a reset or a repair"
    for index, used_mib, errors in rows:
        if used_mib > MOST_GPU_MIB_IN_USE:
            yield f"GPU {index}: {used_mib:,} MiB are in use"
        if errors > 0:
            yield f"GPU {index}: {errors} uncorrected memory errors"


def driver() -> str:
    """The version of this node's NVIDIA driver, `-` where none answers."""
    return next((version for (version,) in _values("driver_version")), "-")


def _gpus() -> list[tuple[int, int, int]]:
    """(index, MiB in use, uncorrected errors) of each GPU; a card without ECC says so, and counts none."""
    return [(int(i), int(used), int(errors) if errors.isdigit() else 0) for i, used, errors in _query(*QUERY)]


def _values(*fields: str) -> list[list[str]]:
    """As `_query`; nothing where the driver does not know one of the fields."""
    try:
        return [row for row in _query(*fields) if len(row) == len(fields)]
    except (OSError, OctoError, subprocess.SubprocessError):
        return []


def _query(*fields: str) -> list[list[str]]:
    """A row a GPU.

    Raises:
        OctoError: the driver refuses.
    """
    asked = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    run = subprocess.run(asked, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    if run.returncode != 0:
        raise OctoError((run.stdout or run.stderr).strip().splitlines()[-1][:200] if run.stdout or run.stderr else "")
    return [[cell.strip() for cell in line.split(",")] for line in run.stdout.splitlines() if line.strip()]


def _failure(command: str) -> str:
    """Why the site's own check failed, empty if it did not."""
    try:
        run = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{command!r} did not end within {COMMAND_TIMEOUT_S} s"
    last = (run.stderr or run.stdout).strip().splitlines()[-1:]
    return f"{command!r} ended with exit code {run.returncode} {' '.join(last)[:200]}" if run.returncode else ""
