"""`octo launch`: what NeMo-Run would submit, and that it ends as the job does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest

from megatron_octo import rundir
from megatron_octo.cli.launch import main
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.launch import nemo
from megatron_octo.launch.slurm import Shape
from megatron_octo.train.state import saved_steps
from tests.conftest import REPOSITORY, snapshot
from tests.prepared import stage, write_data
from tests.slurm import login_node
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import forget_jobs

pytestmark = [
    pytest.mark.skipif(find_spec("nemo_run") is None, reason="nemo-run is not installed"),
    pytest.mark.timeout(900),
]
RECIPE = "recipes/llama32_3b.py:stable_200b"
START_S = 300.0
"""A training here takes no longer to start, or to save and end."""
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
    (checkout / "home").mkdir()  # SkyPilot, where it is installed, keeps an id there
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


SKYPILOT = (RECIPE, "--on", "skypilot", *KUBERNETES[3:], "--gpu", "H100")


def test_a_dry_run_shows_the_task_of_skypilot_and_touches_nothing(checkout: Path):
    pytest.importorskip("sky", reason="SkyPilot is not installed")
    (checkout / "home").mkdir()  # it keeps an id there
    before = sorted(checkout.iterdir())
    overrides = ["--save.every-steps", "7"]
    done = launch(checkout, *SKYPILOT, "--nodes", "4", *overrides, "--dry-run")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["num_nodes"] == 4
    assert shown["resources"]["infra"] == "kubernetes"
    assert shown["resources"]["accelerators"] == {"H100": 8}
    assert list(shown["resources"]["image_id"].values()) == ["docker:registry/octo:1"]
    assert shown["envs"] == {"OCTO_RUNS": "/shared/runs"}
    pod = shown["resources"]["_cluster_config_overrides"]["kubernetes"]["pod_config"]["spec"]
    assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
    assert pod["containers"] == [{"volumeMounts": [{"name": "runs", "mountPath": "/shared"}]}]
    assert sorted(checkout.iterdir()) == before
    skypilots = {
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }
    says = 'conda() { :; }; cd() { :; }; python() { printf "%s " "$@"; }\n'
    ran = subprocess.run(["bash", "-c", says + shown["run"]], env=skypilots, capture_output=True, text=True, check=True)
    ranks = "--nnodes=2 --node-rank=1 --nproc-per-node=8 --master-addr=10.0.0.7 --master-port=29500"
    command = f"-m megatron_octo.launch.ranks {ranks} -m megatron_octo train {RECIPE} {' '.join(overrides)} "
    assert ran.stdout.splitlines()[-1] == command


@pytest.mark.skipif(find_spec("sky") is not None, reason="SkyPilot is installed")
def test_without_skypilot_the_command_that_installs_it_is_named(checkout: Path):
    done = launch(checkout, *SKYPILOT, "--dry-run")
    assert done.returncode == 1
    assert "fix: pip install 'nemo-run[skypilot]==0.11.1'" in done.stderr


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
        (("recipes/rl_zero.py:llama32_3b_long", *SKYPILOT[1:]), "runs training only"),
        (SKYPILOT[:-4], "--volume CLAIM:/PATH"),
        (SKYPILOT[:-2], "--gpu H100"),
        ((*SKYPILOT, "--wait"), "leave --wait out"),
    ],
)
def test_what_kubernetes_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], why: str):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(BadInput, match=why):
        main([*words, "--dry-run"])


def test_nodes_that_the_recipe_does_not_fit_are_refused(checkout: Path):
    done = launch(checkout, RECIPE, "--on", "slurm", "--nodes", "3")
    assert done.returncode == 2
    assert "fix: sbatch --nodes=2 or --nodes=4" in done.stderr


def test_what_slurm_would_end_as_soon_as_it_starts_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(BadInput, match=r"--time=10:00 --signal=B:USR1@900: .* as soon as it starts\n"):
        main([RECIPE, "--on", "slurm", "--time", "10:00", "--dry-run"])


def test_what_sbatch_reads_from_the_environment_here_is_checked(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "3")
    with pytest.raises(BadInput, match="8 nodes x 3 GPUs: "):
        main([RECIPE, "--on", "slurm", "--dry-run"])
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "4")
    monkeypatch.setattr(nemo, "sbatch_text", lambda job, target: f"{target.shape.ranks} ranks")
    for host, ranks in (([], 32), (["--host", "cluster"], 64)):  # sbatch there has another environment
        main([RECIPE, "--on", "slurm", *host, "--dry-run"])
        assert capsys.readouterr().out == f"{ranks} ranks\n"


def test_a_checkout_without_a_site_file_is_refused(checkout: Path):
    (checkout / "bin" / "sbatch").symlink_to("/bin/true")
    where = {"PATH": f"{checkout}/bin{os.pathsep}{os.environ['PATH']}"}
    done = launch(checkout, RECIPE, "--on", "slurm", "--checkout", "/nowhere", **where)
    assert done.returncode == 2, done.stderr
    assert "no site file /nowhere/slurm/site.sh" in done.stderr


def test_a_checkout_without_a_site_file_on_the_other_side_is_refused():
    target = nemo.Target(on="slurm", host="cluster", shape=Shape(nodes=1, gpus_per_node=8), checkout=Path("/nowhere"))
    with pytest.raises(BadInput, match=r"no site file /nowhere/slurm/site.sh on cluster"):
        nemo._check_there(Mock(run=Mock(return_value=Mock(ok=False))), target)
    nemo._check_there(Mock(run=Mock(return_value=Mock(ok=True))), target)


ON_SLURM = ("--on", "slurm", "--account", "me", "--partition", "main", "--nodes", "2", "--wait")


@pytest.mark.slow
@pytest.mark.parametrize(("stub_exit", "code"), [(0, 0), (2, 1)])
def test_a_launch_on_slurm_ends_as_its_job_does(slurm: Cluster, stubbed: Path, stub_exit: int, code: int):
    done = launch(stubbed, RECIPE, *ON_SLURM, **slurm.environment, STUB_EXIT=str(stub_exit))
    assert done.returncode == code, done.stdout + done.stderr
    (records,) = (stubbed / "runs" / "slurm").iterdir()
    assert (records / "hosts").read_text().split() == ["node1", "node2"]
    assert (records / "state").read_text().startswith("failed exit code 2" if code else "done ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stub_exit", "code", "account"), [(0, 0, "COMPLETED|0:0"), (2, 1, "FAILED|2:0")], ids=["done", "failed"]
)
def test_a_launch_ends_as_the_accounts_of_slurm_say(
    accounted_slurm: Cluster, stubbed: Path, stub_exit: int, code: int, account: str
):
    forget_jobs(stubbed)
    done = launch(stubbed, RECIPE, *ON_SLURM, **accounted_slurm.environment, STUB_EXIT=str(stub_exit))
    assert done.returncode == code, done.stdout + done.stderr
    state = account.partition("|")[0]
    (job,) = re.findall(rf"job (\d+): {state} ", done.stderr)
    assert accounted_slurm("sacct", "-nXP", "-j", job, "--format=State,ExitCode") == account


@pytest.mark.slow
@pytest.mark.parametrize(("stub_exit", "code"), [(0, 0), (2, 1)])
def test_a_launch_by_ssh_ends_as_the_job_there_does(
    slurm: Cluster, stubbed: Path, tmp_path: Path, stub_exit: int, code: int
):
    if why := login_node.missing():
        pytest.skip(why)
    there = {**slurm.environment, "STUB_EXIT": str(stub_exit)}
    with login_node.login_node(tmp_path / "here", there) as here:
        ssh = ["--host", "cluster", "--checkout", stubbed]
        done = launch(REPOSITORY, RECIPE, *ON_SLURM, *ssh, **here, OCTO_RUNS=str(tmp_path / "no runs"))
    assert done.returncode == code, done.stdout + done.stderr
    assert "ended FAILED: failed exit code 2" in done.stderr or code == 0
    (records,) = (stubbed / "runs" / "slurm").iterdir()
    assert (records / "hosts").read_text().split() == ["node1", "node2"]


FOLLOWED = {
    "a job that is cancelled": (["PENDING \n", "CANCELLED \n"], "job 7 ended CANCELLED: it had not started"),
    "the job that goes on for it": (
        ["COMPLETED resubmitted as job 9: saved in time\n", "FAILED failed exit code 1\n"],
        "job 9 ended FAILED: failed exit code 1",
    ),
    "a way that breaks": ([OSError(), "RUNNING running\n", " running\n", "TIMEOUT running\n"], "job 7 ended TIMEOUT"),
}


@pytest.mark.parametrize(("answers", "end"), FOLLOWED.values(), ids=FOLLOWED)
def test_a_job_is_followed_to_its_end(monkeypatch: pytest.MonkeyPatch, answers: list[str | Exception], end: str):
    monkeypatch.setattr(nemo, "POLL_S", 0.0)
    with pytest.raises(OctoError, match=end):
        nemo._follow("7", Mock(run=Mock(side_effect=map(answer, answers))), Path())


@pytest.mark.parametrize(
    ("answers", "end"),
    [
        (["COMPLETED done runs/x\n"], "job 7"),
        (
            ["COMPLETED resubmitted as job 9: saved\n", "COMPLETED stopped by STOP\n"],
            "job 9 stopped by STOP",
        ),
    ],
)
def test_a_job_that_was_stopped_ends_well_and_says_so(monkeypatch: pytest.MonkeyPatch, answers: list[str], end: str):
    monkeypatch.setattr(nemo, "POLL_S", 0.0)
    assert nemo._follow("7", Mock(run=Mock(side_effect=map(answer, answers))), Path()) == end


def test_a_job_of_which_slurm_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nemo, "SILENCE_S", 0.0)
    with pytest.raises(OctoError, match="Slurm says nothing of job 7"):
        nemo._follow("7", Mock(run=Mock(return_value=answer(" done runs/x\n"))), Path())


def answer(said: str | Exception) -> Mock | Exception:
    """What a tunnel's `run` returns, or raises."""
    return said if isinstance(said, Exception) else Mock(stdout=said)


@pytest.mark.parametrize(("code", "message"), [(0, "run: 512 tokens in"), (1, "not all jobs succeeded")])
def test_a_launch_here_ends_as_the_training_does(tmp_path: Path, code: int, message: str):
    write_data(tmp_path / "data")
    config = stage(tmp_path / ("data" if code == 0 else "nowhere"), "run", steps=2)
    rundir.write_json(tmp_path / "stage.json", to_dict(config))
    words = [tmp_path / "stage.json", "--on", "local", "--gpus-per-node", "2"]
    done = launch(REPOSITORY, *words, HOME=str(tmp_path), OCTO_RUNS=str(tmp_path))
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
    assert rundir.is_done(tmp_path / "run") == (code == 0)


@pytest.mark.slow
def test_a_training_that_was_launched_here_saves_and_ends_with_the_launch(tmp_path: Path):
    write_data(tmp_path / "data")
    rundir.write_json(tmp_path / "stage.json", to_dict(stage(tmp_path / "data", "run", steps=100_000)))
    run = tmp_path / "run"
    environment = {**os.environ, "HOME": str(tmp_path), "OCTO_RUNS": str(tmp_path)}
    argv = [sys.executable, "-m", "megatron_octo", "launch", str(tmp_path / "stage.json"), "--on", "local"]
    with subprocess.Popen(argv, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL) as launched:
        wait_for((run / "metrics.jsonl").exists, START_S)
        launched.terminate()
    assert launched.returncode == 1
    wait_for(lambda: not rundir.in_use(run), START_S)
    assert saved_steps(run)
    assert not rundir.is_done(run)


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
