"""`octo launch`: what NeMo-Run would submit, and that it ends as the job does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.train import MidTrainConfig
from tests.conftest import REPOSITORY, snapshot
from tests.slurm.cluster import Cluster
from tests.slurm.test_scripts import stubbed

pytestmark = [
    pytest.mark.skipif(find_spec("nemo_run") is None, reason="nemo-run is not installed"),
    pytest.mark.timeout(900),
]
__all__ = ["stubbed"]
RECIPE = "recipes/llama32_3b.py:stable_200b"
GOLDEN = REPOSITORY / "tests" / "golden" / "launch_slurm.json"


def launch(folder: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`octo launch WORDS` in `folder`, with a home folder of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_octo", "launch", *map(str, words)],
        cwd=folder,
        env={**os.environ, "HOME": str(folder / "home"), "OCTO_RUNS": str(folder / "runs"), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_dry_run_shows_the_sbatch_text_and_touches_nothing(checkout: Path):
    before = snapshot(checkout / "slurm"), sorted(checkout.iterdir())
    words = ["--account", "me", "--partition", "gpu", "--nodes", "4", "--save.every-steps", "7"]
    done = launch(checkout, RECIPE, "--on", "slurm", *words, "--dry-run", HF_TOKEN="do-not-print-me")
    assert done.returncode == 0, done.stderr
    assert "nodes   4 x 8 GPUs = 32 ranks" in done.stderr
    assert "do-not-print-me" not in done.stdout + done.stderr
    text = re.sub(r"_\d{16,}", "_ID", done.stdout.replace(str(checkout), "CHECKOUT"))
    assert text.splitlines() == rundir.read_json(GOLDEN)["lines"]
    assert (snapshot(checkout / "slurm"), sorted(checkout.iterdir())) == before


def test_nodes_that_the_recipe_does_not_fit_are_refused(checkout: Path):
    done = launch(checkout, RECIPE, "--on", "slurm", "--nodes", "3")
    assert done.returncode == 2
    assert "fix: sbatch --nodes=2 or --nodes=4" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("stub_exit", "code"), [(0, 0), (2, 1)])
def test_a_launch_on_slurm_ends_as_its_job_does(slurm: Cluster, stubbed: Path, stub_exit: int, code: int):
    words = ["--on", "slurm", "--account", "me", "--partition", "main", "--nodes", "2", "--wait"]
    done = launch(stubbed, RECIPE, *words, **slurm.environment, STUB_EXIT=str(stub_exit))
    assert done.returncode == code, done.stdout + done.stderr
    (records,) = (stubbed / "runs" / "slurm").iterdir()
    assert (records / "hosts").read_text().split() == ["node1", "node2"]
    assert (records / "state").read_text().startswith("failed exit code 2" if code else "done ")


@pytest.mark.slow
def test_a_recipe_lives_inside_a_users_own_partial():
    import nemo_run

    config = load_recipe(str(REPOSITORY / RECIPE), MidTrainConfig)
    mine = nemo_run.Partial(count_steps, settings=to_dict(config))
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    serializer = ZlibJSONSerializer()
    import fiddle

    assert fiddle.build(serializer.deserialize(serializer.serialize(mine)))() == 50_000


def count_steps(settings: dict) -> int:
    """A user's own task around a recipe."""
    from megatron_octo.config.base import from_dict

    return from_dict(MidTrainConfig, settings, origin="a Partial").num_steps
