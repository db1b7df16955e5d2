"""A process that sees no GPU, on a machine that has packages for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

PROGRAM = """
from megatron_octo.platform import resolve
resolve().activate()
from megatron.core.extensions import transformer_engine
from megatron.core.optimizer import Adam
print(transformer_engine.HAVE_TE, Adam.__module__)
"""


def test_megatron_on_the_cpu_takes_no_kernels_of_packages_for_gpus(tmp_path: Path):
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('no GPU')\n")
    path = os.pathsep.join((str(tmp_path), str(REPOSITORY), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["False", "megatron_octo.platform.fused_adam"], done.stderr[-2000:]
