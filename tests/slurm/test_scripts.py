"""slurm/*.sh as they are: they submit unchanged, start the right ranks, and refuse what is wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from tests.conftest import REPOSITORY
from tests.prepared import stage, write_data
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import output, set_in_site, submit, tasks

SCRIPTS = REPOSITORY / "slurm"
SECRET = "do-not-print-me"


def assert_a_rank_a_gpu(said: list[list], job: str, *, num_nodes: int) -> None:
    """Tasks of a training's job are its ranks, eight a node in order, which meet at the first node."""
    size = 8 * num_nodes
    assert sorted(int(rank) for _, rank, *_ in said) == list(range(size))
    for _, rank, *where, _, _ in said:
        node, local = divmod(int(rank), 8)
        meet = ["node1", str(20000 + int(job)), "0,1,2,3,4,5,6,7"]
        assert where == [str(size), str(local), f"node{node + 1}", *meet]


def test_shellcheck_finds_nothing():
    scripts = [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*/*.sh")]
    assert len(scripts) > 8
    found = subprocess.run(["shellcheck", "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("words", [["stable_200b.sh"], ["decay_20b.sh", "long"]])
def test_training_starts_unchanged_with_a_rank_a_gpu(slurm: Cluster, stubbed: Path, words: list[str]):
    job = submit(slurm, stubbed, f"slurm/{words[0]}", *words[1:], HF_TOKEN=SECRET, WANDB_API_KEY=SECRET)
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    said = tasks(stubbed, f"{job}.0")
    assert_a_rank_a_gpu(said, job, num_nodes=8)
    assert slurm.field(job, "Comment").startswith(str(stubbed / "runs" / "llama32-3b-"))
    text = output(stubbed, job)
    assert "nodes   8 x 8 GPUs = 64 ranks" in text
    assert "batch   512 sequences = data 64 x micro-batches 8 x sequences 1" in text
    records = stubbed / "runs" / "slurm" / f"{job}.0"
    function = "stable_200b" if words[0] == "stable_200b.sh" else "decay_long"
    assert said[0][0] == ["train", f"recipes/llama32_3b.py:{function}"]
    assert (records / "hosts").read_text().split() == [f"node{n}" for n in range(1, 9)]
    assert rundir.read_json(records / "config.json")["name"].startswith("llama32-3b-")
    assert (records / "batch.sh").read_text() == (SCRIPTS / words[0]).read_text()
    assert "HF_TOKEN" in (records / "environment.txt").read_text()
    assert (records / "state").read_text().startswith("done ")
    for path in (*records.iterdir(), *(stubbed / "slurm" / "logs").iterdir()):
        assert SECRET not in path.read_text(), path


def test_the_code_of_a_job_is_on_record_and_what_a_container_needs_goes_before_each_command(slurm, stubbed):
    git = ("git", "-C", stubbed, "-c", "user.name=x", "-c", "user.email=x@x")
    for words in (["init", "--quiet"], ["add", "slurm"], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    with (stubbed / "slurm" / "stable_200b.sh").open("a") as script:
        script.write("# changed by hand\n")
    set_in_site(stubbed, "OCTO_EXEC=(env MASTER_PORT=7)")
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    records = stubbed / "runs" / "slurm" / f"{job}.0"
    assert (records / "code.txt").read_text().startswith(head)
    assert "+# changed by hand" in (records / "code.diff").read_text()
    assert {port for _, _, _, _, _, _, port, *_ in tasks(stubbed, f"{job}.0")} == {"7"}


def test_training_on_64_nodes_starts_unchanged(wide_slurm: Cluster, stubbed: Path):
    job = submit(wide_slurm, stubbed, "--nodes=64", "slurm/stable_200b.sh")
    assert wide_slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    assert wide_slurm.field(job, "Restarts") == "0", output(stubbed, job)
    assert_a_rank_a_gpu(tasks(stubbed, f"{job}.0"), job, num_nodes=64)
    text = output(stubbed, job)
    assert "nodes   64 x 8 GPUs = 512 ranks" in text
    assert "batch   512 sequences = data 512 x micro-batches 1 x sequences 1" in text
    hosts = (stubbed / "runs" / "slurm" / f"{job}.0" / "hosts").read_text().split()
    assert hosts == [f"node{n}" for n in range(1, 65)]


@pytest.mark.parametrize(
    ("script", "args", "command"),
    [
        ("convert", ["to-hf", "runs/x"], ["convert", "to-hf", "runs/x"]),
        ("evaluate", ["recipes/miniature.py"], ["evaluate", "recipes/miniature.py"]),
        ("rl", ["long"], ["rl", "recipes/rl_zero.py:llama32_3b_long"]),
        ("report", ["runs/x"], ["report", "runs/x"]),
        ("prepare_data", ["prepare", "recipes/corpora.py:math8k"], ["data", "prepare", "recipes/corpora.py:math8k"]),
    ],
)
def test_other_stages_start_unchanged_with_one_task(slurm, stubbed, script, args, command):
    job = submit(slurm, stubbed, f"slurm/{script}.sh", *args)
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    ((argv, rank, size, *_, bound, _),) = tasks(stubbed, f"{job}.0")
    assert (argv, rank, size, bound) == (command, "0", "1", "none")


def test_model_branch_nodes_and_overrides_come_from_the_command_line(slurm, stubbed):
    words = ["slurm/decay_20b.sh", "long", "--model", "llama31_8b@h200", "--save.every-steps", "7"]
    job = submit(slurm, stubbed, "--nodes=2", *words)
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    said = tasks(stubbed, f"{job}.0")
    assert len(said) == 16
    assert said[0][0] == ["train", "recipes/llama31_8b.py:decay_long@h200", "--save.every-steps", "7"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--nodes=3", "slurm/stable_200b.sh"], "fix: sbatch --nodes=2 or --nodes=4"),
        (["slurm/decay_20b.sh", "lnog"], "did you mean 'decay_long'?"),
        (["slurm/decay_20b.sh"], "which branch?"),
        (["slurm/stable_200b.sh", "--model", "llama32_3"], "did you mean recipes/llama32_3b.py?"),
        (["--nodes=1", "slurm/stable_200b.sh"], "runs/data/megamath-web-pro-max does not exist"),
    ],
)
def test_a_bad_recipe_fails_before_a_rank_starts_and_is_not_requeued(slurm, checkout, words, why):
    job = submit(slurm, checkout, *words)
    assert slurm.wait_end(job) == "FAILED"
    assert (slurm.field(job, "Restarts"), slurm.field(job, "ExitCode")) == ("0", "2:0")
    assert why in output(checkout, job)
    assert (checkout / "runs" / "slurm" / f"{job}.0" / "state").read_text().startswith("failed octo ")


def test_settings_that_do_not_fit_the_nodes_are_refused_at_the_start(slurm, checkout):
    write_data(checkout / "data")
    rundir.write_json(checkout / "stage.json", to_dict(stage(checkout / "data", "run")))
    job = submit(slurm, checkout, "--nodes=2", "slurm/stable_200b.sh", "--recipe", "stage.json")
    assert slurm.wait_end(job) == "FAILED"
    assert "2 nodes x 8 GPUs: budget.batch_sequences 8 does not divide" in output(checkout, job)
