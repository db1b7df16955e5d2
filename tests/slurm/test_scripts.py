"""slurm/*.sh as they are: they submit unchanged, start the right ranks, and refuse what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from tests.conftest import REPOSITORY, snapshot
from tests.prepared import stage, write_data
from tests.slurm.cluster import Cluster, wait_for

SCRIPTS = REPOSITORY / "slurm"
SECRET = "do-not-print-me"


@pytest.fixture
def stubbed(checkout: Path) -> Path:
    """The checkout with tasks that only say where they are."""
    stub = checkout / "bin" / "stub"
    stub.write_text(f'#!/bin/bash\nexec {sys.executable} -S {REPOSITORY}/tests/slurm/stub.py "$@"\n')
    stub.chmod(0o755)
    site = checkout / "slurm" / "site.sh"
    site.write_text(f"{site.read_text()}OCTO_PYTHON={stub}\nexport PYTHONPATH={REPOSITORY}\n")
    return checkout


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
    ((argv, rank, size, *_, bound),) = tasks(stubbed, f"{job}.0")
    assert (argv, rank, size, bound) == (command, "0", "1", "none")


def test_model_branch_nodes_and_overrides_come_from_the_command_line(slurm, stubbed):
    words = ["slurm/decay_20b.sh", "long", "--model", "llama31_8b@h200", "--save.every-steps", "7"]
    job = submit(slurm, stubbed, "--nodes=2", *words)
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    said = tasks(stubbed, f"{job}.0")
    assert len(said) == 16
    assert said[0][0] == ["train", "recipes/llama31_8b.py:decay_long@h200", "--save.every-steps", "7"]


@pytest.mark.parametrize(
    ("code", "restarts", "why"),
    [("1", "2", "3 starts ended without a save in between"), ("2", "0", "failed: exit code 2")],
)
def test_crashes_without_a_save_end_a_job_and_so_does_bad_input_that_ranks_find(slurm, stubbed, code, restarts, why):
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh", STUB_EXIT=code)
    assert slurm.wait_end(job) == "FAILED"
    assert slurm.field(job, "Restarts") == restarts
    assert why in output(stubbed, job)


@pytest.fixture
def resubmitting(stubbed: Path) -> Path:
    """A site whose jobs may not be requeued; submit with --no-requeue."""
    site = stubbed / "slurm" / "site.sh"
    site.write_text(f"{site.read_text()}OCTO_REQUEUE=resubmit\n")
    return stubbed


def successor(checkout: Path, job: str) -> str:
    """The job that goes on where `job` ended."""
    state = (checkout / "runs" / "slurm" / f"{job}.0" / "state").read_text()
    (found,) = re.findall(r"^resubmitted as job (\d+): ", state)
    return found


def test_where_slurm_may_not_requeue_a_job_goes_on_as_another_and_others_wait_for_that(slurm, resubmitting):
    words = ["--no-requeue", "--nodes=2", "--time=2:00:00", "--job-name=mine", "slurm/stable_200b.sh"]
    job = submit(slurm, resubmitting, *words, "--save.every-steps", "7", STUB_PLAN_S="5")
    after = slurm("sbatch", "--parsable", f"--dependency=afterok:{job}", "--output=/dev/null", "--wrap=true")
    slurm.wait(job, (resubmitting / "runs" / "slurm" / f"{job}.0" / "state").exists)
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait_end(job) == "COMPLETED", output(resubmitting, job)
    again = successor(resubmitting, job)
    assert slurm.wait_end(again) == "COMPLETED", output(resubmitting, again)
    for name in ("NumNodes", "TimeLimit", "JobName"):
        assert slurm.field(again, name) == slurm.field(job, name)
    said = tasks(resubmitting, f"{again}.0")
    assert len(said) == 16
    assert said[0][0][2:] == ["--save.every-steps", "7"]
    assert slurm.wait_end(after) == "COMPLETED"
    assert slurm.field(after, "StartTime") >= slurm.field(again, "EndTime")


def test_crashes_are_counted_over_jobs_that_go_on_from_each_other(slurm, resubmitting):
    jobs = [submit(slurm, resubmitting, "--no-requeue", "--nodes=1", "slurm/stable_200b.sh", STUB_EXIT="1")]
    while slurm.wait_end(jobs[-1]) == "COMPLETED":
        jobs.append(successor(resubmitting, jobs[-1]))
    assert len(jobs) == 3
    assert "3 starts ended without a save in between" in output(resubmitting, jobs[-1])


@pytest.mark.parametrize(
    ("words", "starts", "said"),
    [
        (["rl.sh", "long"], 3, "asked to end, and its last save is of step 0\n  fix: .*--save-every"),
        (["stable_200b.sh"], 3, "asked to end, and its last save is of step 0\n  fix: .*--time"),
        (["evaluate.sh", "recipes/miniature.py"], 4, "its time limit was near\n  fix: .*--time"),
    ],
    ids=["rl", "training", "what saves nothing by step"],
)
def test_a_job_that_its_time_limit_always_ends_before_a_save_fails_and_says_what_to_set(
    slurm, stubbed, words, starts, said
):
    site = stubbed / "slurm" / "site.sh"
    site.write_text(f"{site.read_text()}MOST_LIMITS=4\n")
    shape = ["--nodes=1", "--gpus-per-node=8", "--time=2:00:00"]
    job = submit(slurm, stubbed, *shape, f"slurm/{words[0]}", *words[1:], STUB_WAITS="1")
    num_tasks = 8 if words[0] == "stable_200b.sh" else 1
    for restart in range(starts):
        ranks = stubbed / "runs" / "slurm" / f"{job}.{restart}" / "ranks.txt"
        slurm.wait(job, lambda ranks=ranks: ranks.exists() and ranks.read_text().count("\n") == num_tasks)
        slurm("scancel", "--batch", "--signal=USR1", job)
        slurm.wait(job, lambda ranks=ranks: not (ranks.with_name("state")).read_text().startswith("running"))
    assert slurm.wait_end(job) == "FAILED"
    assert slurm.field(job, "Restarts") == str(starts - 1)
    said = f"{starts} starts ended without a save in between; {said}"
    assert re.search(said, output(stubbed, job)), output(stubbed, job)
    (*_, end), *_ = tasks(stubbed, f"{job}.{starts - 1}")
    assert datetime.fromtimestamp(int(end)) - datetime.fromisoformat(slurm.field(job, "StartTime")) == timedelta(
        hours=2
    )


def test_a_job_that_may_not_be_requeued_fails_and_says_what_to_set(slurm, stubbed):
    job = submit(slurm, stubbed, "--no-requeue", "--nodes=1", "slurm/stable_200b.sh", STUB_EXIT="1")
    assert slurm.wait_end(job) == "FAILED"
    assert "fix: set OCTO_REQUEUE=resubmit" in output(stubbed, job)


def test_a_time_limit_before_the_ranks_start_requeues_the_job(slurm, stubbed):
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh", STUB_PLAN_S="5")
    state = stubbed / "runs" / "slurm" / f"{job}.0" / "state"
    slurm.wait(job, state.exists)
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    assert slurm.field(job, "Restarts") == "1"
    assert state.read_text() == "requeued asked to end before the ranks had started\n"


def test_a_node_that_fails_the_preflight_is_left_out(slurm, stubbed):
    (stubbed / "bin" / "node1").touch()
    job = submit(slurm, stubbed, "--nodes=2", "slurm/stable_200b.sh")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    assert slurm.field(job, "Restarts") == "1"
    assert "node1 bad: GPU 0: 3 uncorrected memory errors" in output(stubbed, job)
    assert {node for _, _, _, _, node, *_ in tasks(stubbed, f"{job}.1")} == {"node2", "node3"}


def test_a_job_that_no_node_is_left_for_fails(slurm, stubbed):
    (stubbed / "bin" / "node1").touch()
    job = submit(slurm, stubbed, "slurm/stable_200b.sh")
    assert slurm.wait_end(job) == "FAILED"
    assert slurm.field(job, "Restarts") == "0"
    said = (stubbed / "runs" / "slurm" / f"{job}.0" / "state").read_text()
    assert said.startswith("failed without node1, which failed the preflight, and no other node can take its place")


def test_a_clock_that_is_off_is_told_from_a_slow_start(slurm, stubbed):
    site = stubbed / "slurm" / "site.sh"
    site.write_text(f"{site.read_text()}MOST_CLOCK_S=1\n")
    job = submit(slurm, stubbed, "--nodes=2", "slurm/stable_200b.sh", STUB_LATE="node1", STUB_SLOW="node2")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    assert re.search(r"node1 bad: its clock is -3\d{3} s off that of the first node", output(stubbed, job))
    assert {node for _, _, _, _, node, *_ in tasks(stubbed, f"{job}.1")} == {"node2", "node3"}


def test_a_node_that_cannot_be_reached_is_left_out_alone(slurm, stubbed):
    site = stubbed / "slurm" / "site.sh"
    site.write_text(f"{site.read_text()}export OCTO_PREFLIGHT='sleep 25'\n")  # longer than srun tries to start a task
    job = submit(slurm, stubbed, "--nodes=4", "slurm/stable_200b.sh", STUB_PLAN_S="5")
    records = stubbed / "runs" / "slurm" / f"{job}.0"
    slurm.wait(job, (records / "job.txt").exists)
    lost = (records / "hosts").read_text().split()[1]
    os.kill(int((slurm.folder / f"slurmd.{lost}.pid").read_text()), signal.SIGKILL)
    try:
        slurm.wait(job, lambda: not (records / "state").read_text().startswith("running"))
        assert (records / "state").read_text() == f"requeued without {lost}, which failed the preflight\n"
        assert f"{lost} bad: it could not be reached" in output(stubbed, job)
    finally:
        slurm("scancel", job)
        slurm("slurmd", "-N", lost)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_node_on_which_nothing_starts_is_left_out_be_it_the_first(slurm, stubbed, bad):
    lost, site = stubbed / "bin" / "lost", stubbed / "slurm" / "site.sh"
    lost.write_text(
        "#!/bin/bash\n"
        f"[[ ! $SLURM_RESTART_COUNT && $SLURM_STEP_ID && $SLURM_NODEID == {bad} ]] && exec /nowhere/python\n"
        f'exec {stubbed}/bin/stub "$@"\n'
    )
    lost.chmod(0o755)
    site.write_text(f"{site.read_text()}OCTO_PYTHON={lost}\n")
    job = submit(slurm, stubbed, "--nodes=2", "slurm/stable_200b.sh")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    hosts = (stubbed / "runs" / "slurm" / f"{job}.0" / "hosts").read_text().split()
    assert slurm.field(job, "ExcNodeList") == hosts[bad]


def test_a_rank_that_is_killed_is_the_reason(slurm, stubbed):
    job = submit(slurm, stubbed, "--nodes=1", "--gpus-per-node=2", "slurm/stable_200b.sh", STUB_WAITS="1")
    records = stubbed / "runs" / "slurm" / f"{job}.0"
    ranks = records / "ranks.txt"
    slurm.wait(job, lambda: ranks.exists() and ranks.read_text().count("\n") == 2)
    os.kill([pid for pid, argv, _ in slurm.processes(job) if "train" in argv][-1], signal.SIGKILL)
    slurm.wait(job, lambda: not (records / "state").read_text().startswith("running"))
    assert re.match(r"requeued node\d: task \d: Killed\n", (records / "state").read_text())
    slurm("scancel", job)


def test_a_job_ends_where_no_node_passes_the_preflight(slurm, stubbed):
    (stubbed / "bin" / "nvidia-smi").unlink()
    job = submit(slurm, stubbed, "--nodes=2", "slurm/stable_200b.sh", PATH="/usr/sbin:/usr/bin:/bin")
    assert slurm.wait_end(job) == "FAILED"
    assert slurm.field(job, "Restarts") == "0"
    assert "no node passed the preflight" in output(stubbed, job)


def test_a_stop_file_ends_a_job_before_it_starts(slurm, stubbed):
    run = stubbed / "runs" / "llama32-3b-stable-200b"
    run.mkdir(parents=True)
    (run / "STOP").touch()
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh")
    assert slurm.wait_end(job) == "COMPLETED"
    assert (stubbed / "runs" / "slurm" / f"{job}.0" / "state").read_text().startswith("stopped")
    assert not (run / "STOP").exists()


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


# ---- a pipeline


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pipeline_is_jobs_that_wait_for_what_they_read(slurm, stubbed):
    words = ["--nodes=1", "--gpus-per-node=1", "recipes/miniature.py:pipeline"]
    said = slurm(stubbed / "slurm" / "pipeline.sh", *words, cwd=stubbed).splitlines()
    lines = [line for line in said if line.startswith("job ")]
    jobs = {name: job for job, name, *_ in (line.removeprefix("job ").split("  ") for line in lines)}
    assert len(jobs) == 19
    again = slurm(stubbed / "slurm" / "pipeline.sh", *words, cwd=stubbed, check=False)
    assert "Slurm has jobs of these runs: " in again
    assert slurm.wait_end(jobs["report"], 600) == "COMPLETED"
    assert slurm.field(jobs["train miniature-stable"], "Comment") == str(stubbed / "runs" / "miniature-stable")
    begun = {name: slurm.field(job, "StartTime") for name, job in jobs.items()}
    ended = {name: slurm.field(job, "EndTime") for name, job in jobs.items()}
    assert {slurm.state(job) for job in jobs.values()} == {"COMPLETED"}
    for branch in ("short", "long", "hybrid"):
        assert ended["train miniature-stable"] <= begun[f"train miniature-decay-{branch}"]
        assert ended[f"train miniature-decay-{branch}"] <= begun[f"export miniature-decay-{branch}"]
        assert ended[f"export miniature-decay-{branch}"] <= begun[f"miniature-rl-{branch}"]
        assert ended[f"miniature-rl-{branch}"] <= begun["evaluate after RL"]
    assert ended["evaluate before RL"] <= begun["report"]

    again = slurm(stubbed / "slurm" / "pipeline.sh", *words, cwd=stubbed)
    assert "train miniature-stable" not in again, "what is done is submitted again"
    assert "miniature-rl-long" not in again


def test_a_pipeline_whose_stages_do_not_fit_is_refused(slurm, stubbed):
    before = slurm("squeue", "-h", "-t", "all", "-o", "%A", "-S", "i")
    said = slurm(
        stubbed / "slurm" / "pipeline.sh", "--nodes=3", "recipes/miniature.py:pipeline", check=False, cwd=stubbed
    )
    assert "3 nodes x 8 GPUs: budget.batch_sequences 8 does not divide" in said
    assert slurm("squeue", "-h", "-t", "all", "-o", "%A", "-S", "i") == before


# ---- what is said of a job: slurm/lib/state.sh


def state(slurm: Cluster, checkout: Path, job: str) -> str:
    """What state.sh says of a job."""
    return slurm(checkout / "slurm" / "lib" / "state.sh", job)


def forget_jobs(checkout: Path) -> None:
    """Let squeue know no job, as it is some minutes after a job's end."""
    squeue = checkout / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\nexit 1\n")
    squeue.chmod(0o755)


def test_the_state_of_a_job_is_what_slurm_and_the_job_say(slurm, stubbed):
    held = submit(slurm, stubbed, "--hold", "--nodes=1", "slurm/stable_200b.sh")
    assert state(slurm, stubbed, held) == "PENDING"
    slurm("scancel", held)
    assert state(slurm, stubbed, held) == "CANCELLED"
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh")
    assert slurm.wait_end(job) == "COMPLETED"
    assert state(slurm, stubbed, job) == f"COMPLETED done {stubbed}/runs/llama32-3b-stable-200b"


def test_of_a_job_that_slurm_has_forgotten_its_accounts_say_the_state(accounted_slurm, stubbed):
    job = submit(accounted_slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh", STUB_EXIT="2")
    held = submit(accounted_slurm, stubbed, "--hold", "--nodes=1", "slurm/stable_200b.sh")
    assert accounted_slurm.wait_end(job) == "FAILED"
    accounted_slurm("scancel", held)
    forget_jobs(stubbed)
    accounted_slurm.wait(job, lambda: state(accounted_slurm, stubbed, job).startswith("FAILED failed exit code 2"))
    accounted_slurm.wait(held, lambda: state(accounted_slurm, stubbed, held) == "CANCELLED")


def listed(slurm: Cluster, checkout: Path) -> dict[int, str]:
    """What `octo runs list` says, by the job."""
    octo = [sys.executable, "-m", "megatron_octo", "runs", "list", "--json"]
    rows = json.loads(slurm(*octo, cwd=checkout, OCTO_RUNS=str(checkout / "runs")))
    return {row["job"]["job"]: f"{row['name']} {row['job']['state']}: {row['job']['reason']}" for row in rows}


def test_jobs_without_a_run_are_listed_before_they_start_and_however_they_end(slurm, stubbed):
    failing = submit(slurm, stubbed, "slurm/convert.sh", "to-hf", "runs/x", STUB_EXIT="2")
    refused = submit(slurm, stubbed, "slurm/decay_20b.sh", "lnog")
    words = ["--hold", "slurm/evaluate.sh", "recipes/miniature.py", "--when", "before"]
    done = submit_checked(stubbed, *words, **slurm.environment)
    assert done.returncode == 0, done.stderr
    (held,) = re.findall(r"Submitted batch job (\d+)", done.stdout)
    for job in (failing, refused):
        assert slurm.wait_end(job) == "FAILED"
    said = listed(slurm, stubbed)
    slurm("scancel", held)
    assert said.keys() == {int(failing), int(refused), int(held)}
    assert said[int(failing)].startswith("convert failed: exit code 2")
    assert said[int(refused)].startswith("decay_20b failed: octo slurm: ")
    assert said[int(held)] == "evaluate pending: JobHeldUser"


def test_a_job_that_was_requeued_and_waits_says_why(slurm, stubbed):
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh", STUB_PLAN_S="5")
    slurm.wait(job, (stubbed / "runs" / "slurm" / f"{job}.0" / "state").exists)
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: slurm.state(job) == "PENDING")
    why = "asked to end before the ranks had started; waits for BeginTime"
    wait_for(lambda: listed(slurm, stubbed) == {int(job): f"llama32-3b-stable-200b requeued: {why}"})
    slurm("scancel", job)


# ---- before submission: slurm/submit.sh


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


def test_submit_checks_and_submits(slurm, stubbed):
    done = submit_checked(stubbed, "--nodes=1", "slurm/stable_200b.sh", **slurm.environment)
    assert done.returncode == 0, done.stderr
    assert "nodes   1 x 8 GPUs = 8 ranks" in done.stderr
    (job,) = re.findall(r"Submitted batch job (\d+)", done.stdout)
    assert slurm.field(job, "Comment") == str(stubbed / "runs" / "llama32-3b-stable-200b")
    assert slurm.wait_end(job) == "COMPLETED"


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (
            "slurm/pipeline.sh recipes/miniature.py:pipeline --num-steps 5",
            {},
            "after the recipe .*--num-steps 5.*fix: ",
        ),
        ("--nodes=3 slurm/stable_200b.sh", {}, "does not divide by 24 data-parallel ranks.*fix: .*--nodes=4"),
        ("slurm/decay_20b.sh lnog", {}, "unknown recipe.*fix: did you mean 'decay_long'"),
        ("slurm/stabel.sh", {}, "no such script: slurm/stabel.sh.*fix: .*slurm/NAME.sh"),
        ("slurm/stable_200b.sh", {"OCTO_SITE": "nowhere.sh"}, "no site file nowhere.sh.*fix: copy one of slurm/sites"),
        ("slurm/stable_200b.sh", {"OCTO_RUNS": "/dev/null/x"}, "log folder /dev/null/x.*fix: .*OCTO_RUNS names"),
        ("slurm/stable_200b.sh", {"SBATCH_GPUS_PER_NODE": "3"}, "8 nodes x 3 GPUs: .*does not divide.*fix: "),
        ("slurm/stable_200b.sh", {"SBATCH_TIMELIMIT": "10"}, "as soon as it starts; .*SBATCH_TIMELIMIT=10.*fix: "),
        ("slurm/stable_200b.sh", {"SBATCH_OUTPUT": "gone/%j.out"}, "log folder gone cannot be written.*fix: "),
    ],
)
def test_bad_input_is_refused_before_anything_is_submitted(slurm, checkout, words, environment, message):
    before, jobs = snapshot(checkout / "slurm"), slurm("squeue", "-h", "-t", "all")
    done = submit_checked(checkout, *words.split(), **slurm.environment, **environment)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr, re.DOTALL), done.stderr
    assert snapshot(checkout / "slurm") == before
    assert slurm("squeue", "-h", "-t", "all") == jobs


def test_where_octo_runs_on_nodes_alone_jobs_are_submitted_unchecked_and_no_pipeline(slurm, checkout):
    site = checkout / "slurm" / "site.sh"
    site.write_text(f"{site.read_text()}OCTO_PYTHON=/bin/false\n")
    done = submit_checked(checkout, "--hold", "slurm/decay_20b.sh", "lnog", **slurm.environment)
    assert "the recipe is checked when the job starts" in done.stderr
    (job,) = re.findall(r"Submitted batch job (\d+)", done.stdout)
    slurm("scancel", job)
    for words, runs, why in (
        (["slurm/stable_200b.sh"], "/dev/null/x", "log folder /dev/null/x cannot be written"),
        (["slurm/pipeline.sh"], str(checkout / "runs"), "/bin/false -m megatron_octo does not run on this machine"),
    ):
        done = submit_checked(checkout, *words, OCTO_RUNS=runs, **slurm.environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.search(f"{why}.*\n  fix: ", done.stderr), done.stderr


def test_where_octo_runs_on_nodes_alone_the_folders_for_logs_are_checked_all_the_same(slurm, checkout):
    site, logs = checkout / "slurm" / "site.sh", checkout / "slurm" / "logs"
    site.write_text(f"{site.read_text()}OCTO_PYTHON=/bin/false\n")

    def refused(why: str, **environment: str) -> None:
        done = submit_checked(checkout, "slurm/stable_200b.sh", **slurm.environment, **environment)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert re.search(f"{why}\n  fix: ", done.stderr), done.stderr

    shutil.move(logs, checkout / "elsewhere")
    refused("log folder slurm/logs cannot be written")
    for file in ("elsewhere/%u/%j.out", "elsewhere/out", "/dev/null"):
        done = submit_checked(checkout, "--hold", "slurm/stable_200b.sh", SBATCH_OUTPUT=file, **slurm.environment)
        (job,) = re.findall(r"Submitted batch job (\d+)", done.stdout)
        slurm("scancel", job)
    shutil.move(checkout / "elsewhere", logs)
    refused("log folder gone cannot be written", SBATCH_OUTPUT="gone/%j.out")
    site.write_text(f"{site.read_text()}LEAST_FREE_KIB=$((1 << 50))\n")
    refused(r"log folder .*: \d+ KiB are left on its disk")


def test_without_slurm_nothing_is_submitted(checkout):
    (checkout / "bin" / "dirname").symlink_to("/usr/bin/dirname")
    done = submit_checked(checkout, "slurm/stable_200b.sh", PATH=f"{checkout}/bin")
    assert done.returncode == 2
    assert "no Slurm here" in done.stderr
