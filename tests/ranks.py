"""Starts a module of the tests as ranks of one group, and says why one failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SAID_BYTES = 4000
Ended = subprocess.CompletedProcess[str]


def launch(module: str, folder: Path, *, timeout_s: float, ranks: int = 2, **environment: str) -> Ended:
    """Run `python -m MODULE FOLDER` as so many ranks by torchrun, to their end, whatever that is."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*torchrun, "-m", module, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def ended_well(done: Ended) -> str:
    """What ranks logged that ended well; else the test fails with their last words, without torchrun's report."""
    if done.returncode != 0:
        said = re.split(r"^[EW]\d{4} .*elastic", done.stderr, maxsplit=1, flags=re.MULTILINE)[0]
        pytest.fail(f"exit code {done.returncode}: {said[-SAID_BYTES:]}", pytrace=False)
    return done.stderr
