"""Before submission and beside jobs: slurm/submit.sh, slurm/pipeline.sh, slurm/lib/state.sh, `octo runs`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import snapshot
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import forget_jobs, set_in_site, submit, submit_checked

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


# ---- before submission: slurm/submit.sh


def test_submit_checks_and_submits(slurm, stubbed):
    done = submit_checked(stubbed, "--nodes=1", "slurm/stable_200b.sh", **slurm.environment)
    assert done.returncode == 0, done.stderr
    assert "nodes   1 x 8 GPUs = 8 ranks" in done.stderr
    (job,) = re.findall(r"Submitted batch job (\d+)", done.stdout)
    assert slurm.field(job, "Comment") == str(stubbed / "runs" / "llama32-3b-stable-200b")
    assert slurm.wait_end(job) == "COMPLETED"


def test_a_job_submitted_inside_of_another_takes_nothing_of_it_for_its_own(slurm, stubbed):
    inside = {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "3", "SLURM_GPUS_PER_NODE": "9"}
    done = submit_checked(stubbed, "slurm/convert.sh", "to-hf", "runs/x", **slurm.environment, **inside)
    (job,) = re.findall(r"Submitted batch job (\d+)", done.stdout)
    assert slurm.wait_end(job) == "COMPLETED"
    assert (stubbed / "runs" / "slurm" / f"{job}.0" / "state").read_text().startswith("done")


def test_jobs_without_gpus_have_options_of_their_own(slurm, stubbed):
    set_in_site(stubbed, "OCTO_CPU_SBATCH=(--partition=urgent)")
    for words, partition in (
        ("convert.sh to-hf runs/x", "urgent"),
        ("evaluate.sh recipes/miniature.py --when before", "main"),
    ):
        script, *args = words.split()
        done = submit_checked(stubbed, "--hold", f"slurm/{script}", *args, **slurm.environment)
        (job,) = re.findall(r"Submitted batch job (\d+)", done.stdout)
        assert slurm.field(job, "Partition") == partition
        slurm("scancel", job)


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
    set_in_site(checkout, "OCTO_PYTHON=/bin/false")
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
    logs = checkout / "slurm" / "logs"
    set_in_site(checkout, "OCTO_PYTHON=/bin/false")

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
    set_in_site(checkout, "LEAST_FREE_KIB=$((1 << 50))")
    refused(r"log folder .*: \d+ KiB are left on its disk")


def test_without_slurm_nothing_is_submitted(checkout):
    (checkout / "bin" / "dirname").symlink_to("/usr/bin/dirname")
    done = submit_checked(checkout, "slurm/stable_200b.sh", PATH=f"{checkout}/bin")
    assert done.returncode == 2
    assert "no Slurm here" in done.stderr
