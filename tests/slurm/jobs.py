"""What tests do with jobs of slurm/*.sh: submit them, read what they and their tasks said."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.slurm.cluster import Cluster


def submit(slurm: Cluster, checkout: Path, *words: object, **environment: str) -> str:
    """`sbatch WORDS` in the checkout; returns the job's id."""
    return slurm("sbatch", "--parsable", *words, cwd=checkout, **environment)


def tasks(checkout: Path, job: str) -> list[list]:
    """What the stub's tasks said."""
    lines = (checkout / "runs" / "slurm" / job / "ranks.txt").read_text().splitlines()
    return [json.loads(line.partition(": ")[2]) for line in lines if ": [" in line]


def output(checkout: Path, job: str) -> str:
    """What the job said."""
    return next((checkout / "slurm" / "logs").glob(f"*-{job}.out")).read_text()


def submit_checked(checkout: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`slurm/submit.sh WORDS`."""
    return subprocess.run(
        [checkout / "slurm" / "submit.sh", *map(str, words)],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def set_in_site(checkout: Path, lines: str) -> None:
    """Add lines to the site's file."""
    site = checkout / "slurm" / "site.sh"
    site.write_text(f"{site.read_text()}{lines}\n")


def shim(checkout: Path, name: str, script: str) -> None:
    """A program of this name for jobs, in the place of another."""
    path = checkout / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def forget_jobs(checkout: Path) -> None:
    """Let squeue know no job, as it is some minutes after a job's end."""
    shim(checkout, "squeue", "exit 1")
