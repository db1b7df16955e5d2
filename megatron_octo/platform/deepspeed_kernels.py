"""DeepSpeed's CPU kernels, compiled once a machine and user, and kept in torch's cache of extensions."""

from __future__ import annotations

import contextlib
from pathlib import Path

KERNELS = ("ShareMemCommBuilder", "FusedAdamBuilder")
TORCH_LOCK = "lock"
"""torch holds a kernel's folder by creating this file; a process that is killed leaves it, and all others wait."""


def compile_cpu_kernels() -> None:
    """Compile what a run on a CPU loads, unless that is done. Call it while nothing else needs the memory.

    Left to the first run, the compilers' 2 GiB would come on top of models and rollout engines.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    for name in KERNELS:
        builder = get_accelerator().create_op_builder(name)
        remove_stale_lock(Path(_get_build_directory(builder.name, verbose=False)))
        builder.load(verbose=False)


def remove_stale_lock(folder: Path) -> None:
    """Remove the lock that a killed process left in a kernel's folder: no process of this machine has it open."""
    import psutil

    path = (folder / TORCH_LOCK).resolve()
    if not path.exists():
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(file.path == str(path) for file in process.open_files()):
                return
    path.unlink(missing_ok=True)
