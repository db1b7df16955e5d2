"""`octo launch`: what NeMo-Run would submit, and that it ends as the job does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.cli.launch import main
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.launch import nemo
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


KUBERNETES = (RECIPE, "--on", "kubernetes", "--image", "registry/octo:1", "--volume", "runs:/shared")


def test_a_dry_run_shows_the_train_job_of_kubernetes_and_touches_nothing(checkout: Path):
    pytest.importorskip("kubernetes", reason="the Kubernetes client is not installed")
    config = checkout / "kubeconfig"
    contexts = {"contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}], "current-context": "c"}
    cluster = {
        "clusters": [{"name": "c", "cluster": {"server": "https://localhost:1"}}],
        "users": [{"name": "u", "user": {"token": "x"}}],
    }
    rundir.write_json(config, {"apiVersion": "v1", "kind": "Config", **contexts, **cluster})
    before = sorted(checkout.iterdir())
    overrides = ["--save.every-steps", "7"]
    words = ["--nodes", "4", "--namespace", "mine", *overrides, "--dry-run"]
    done = launch(checkout, *KUBERNETES, *words, KUBECONFIG=str(config))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["kind"], shown["metadata"]["namespace"]) == ("TrainJob", "mine")
    trainer, (pods,) = shown["spec"]["trainer"], shown["spec"]["podTemplateOverrides"]
    ranks = ["python", "-m", "megatron_octo.launch.ranks", "-m", "megatron_octo"]
    assert trainer["command"] == [*ranks, "train", RECIPE, *overrides]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (4, 8, "registry/octo:1")
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    assert {"name": "OCTO_RUNS", "value": "/shared/runs"} in trainer["env"]
    mounts = {each["name"]: each["mountPath"] for each in pods["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {"runs": "/shared", "shm": "/dev/shm"}
    assert pods["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert sorted(checkout.iterdir()) == before


@pytest.mark.skipif(find_spec("kubernetes") is not None, reason="the Kubernetes client is installed")
def test_without_the_kubernetes_client_the_command_that_installs_it_is_named(checkout: Path):
    done = launch(checkout, *KUBERNETES, "--dry-run")
    assert done.returncode == 1
    assert "fix: pip install 'nemo-run[kubeflow]==0.11.1'" in done.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (KUBERNETES[:5], "--volume CLAIM:/PATH"),
        ((*KUBERNETES[:-1], "runs"), "--volume CLAIM:/PATH"),
        (("recipes/rl_zero.py:llama32_3b_long", *KUBERNETES[1:]), "runs training only"),
    ],
)
def test_what_a_train_job_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], why: str):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(BadInput, match=why):
        main([*words, "--dry-run"])


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


def test_a_job_is_followed_to_the_one_that_goes_on_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("OCTO_RUNS", str(tmp_path))
    monkeypatch.setattr(nemo, "POLL_S", 0.0)
    for start, state in (("7.0", "resubmitted as job 9: saved in time\n"), ("9.0", "failed exit code 1\n")):
        rundir.write_atomic(tmp_path / "slurm" / start / "state", state)
    with pytest.raises(OctoError, match="job 9 failed: exit code 1"):
        nemo._follow("7")


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
