"""How a job of slurm/*.sh ends, and when it is queued again: crashes, time limits, bad nodes, a Slurm that is away."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_for
from tests.slurm.jobs import output, set_in_site, shim, submit, tasks


@pytest.mark.parametrize(
    ("code", "restarts", "why"),
    [
        ("1", "2", "3 starts ended without a save in between"),
        ("2", "0", "failed: exit code 2"),
        ("3", "0", "failed: exit code 3"),
    ],
    ids=["crashes without a save", "bad input that ranks find", "the watch of RL"],
)
def test_a_job_is_not_queued_again_for_ever(slurm, stubbed, code, restarts, why):
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh", STUB_EXIT=code)
    assert slurm.wait_end(job) == "FAILED"
    assert slurm.field(job, "Restarts") == restarts
    assert why in output(stubbed, job)


def test_what_a_job_that_has_run_before_finds_wrong_may_be_a_nodes_fault(slurm, stubbed):
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh", STUB_EXIT="1,2,0")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    assert slurm.field(job, "Restarts") == "2"


def test_a_slurm_that_does_not_answer_for_a_while_costs_no_save_and_no_start(slurm, stubbed):
    away = stubbed / "away"
    for name in ("scontrol", "scancel"):
        shim(stubbed, name, f'[[ -e {away} && $* != *hostnames* ]] && exit 1\nexec {shutil.which(name)} "$@"')
    set_in_site(stubbed, "ASK_AGAIN_S=1")
    job = submit(slurm, stubbed, "--nodes=1", "--gpus-per-node=2", "slurm/stable_200b.sh", STUB_WAITS="1")
    records = stubbed / "runs" / "slurm" / f"{job}.0"
    ranks = records / "ranks.txt"
    slurm.wait(job, lambda: ranks.exists() and ranks.read_text().count("\n") == 2)
    away.touch()
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: not any("train" in argv for _, argv, _ in slurm.processes(job)))
    time.sleep(3)
    assert (records / "state").read_text() == "running\n"
    away.unlink()
    slurm.wait(job, lambda: not (records / "state").read_text().startswith("running"))
    assert (records / "state").read_text() == "requeued asked to end, and its last save is of step 0\n"
    slurm("scancel", job)


def test_tasks_get_the_sites_environment_whatever_sbatch_exports(slurm, stubbed):
    job = submit(slurm, stubbed, "--export=PATH", "--nodes=1", "slurm/stable_200b.sh")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)


def test_an_array_is_refused(slurm, stubbed):
    said = slurm("sbatch", "--wait", "--parsable", "--array=0-1", "slurm/stable_200b.sh", cwd=stubbed, check=False)
    assert slurm.field(said.split()[0], "ExitCode") == "2:0"
    for log in (stubbed / "slurm" / "logs").glob("*.out"):
        assert re.search("an array's tasks would all be the same run\n  fix: ", log.read_text())


@pytest.fixture
def resubmitting(stubbed: Path) -> Path:
    """A site whose jobs may not be requeued."""
    set_in_site(stubbed, "OCTO_REQUEUE=resubmit")
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
    set_in_site(stubbed, "MOST_LIMITS=4")
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


def test_a_job_that_slurm_will_not_requeue_goes_on_as_another_without_being_told(slurm, stubbed):
    job = submit(slurm, stubbed, "--no-requeue", "--nodes=1", "slurm/stable_200b.sh", STUB_EXIT="1")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    again = successor(stubbed, job)
    assert slurm.field(again, "Requeue") == "0"
    slurm("scancel", again)


def test_a_job_that_cannot_be_requeued_fails_and_says_what_to_set(slurm, stubbed):
    shim(stubbed, "scontrol", f'[[ $1 == requeue ]] && exit 1\nexec {shutil.which("scontrol")} "$@"')
    job = submit(slurm, stubbed, "--nodes=1", "slurm/stable_200b.sh", STUB_EXIT="1")
    assert slurm.wait_end(job) == "FAILED"
    assert re.search("fix: .*OCTO_REQUEUE=resubmit", output(stubbed, job))


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
    set_in_site(stubbed, "MOST_CLOCK_S=1")
    job = submit(slurm, stubbed, "--nodes=2", "slurm/stable_200b.sh", STUB_LATE="node1", STUB_SLOW="node2")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    assert re.search(r"node1 bad: its clock is -3\d{3} s off that of the first node", output(stubbed, job))
    assert {node for _, _, _, _, node, *_ in tasks(stubbed, f"{job}.1")} == {"node2", "node3"}


def test_a_first_node_whose_clock_is_off_is_left_out_and_not_all_the_others(slurm, stubbed):
    shim(
        stubbed,
        "date",
        "[[ $1 == +%s && ! $SLURM_RESTART_COUNT ]] && exec /bin/date -d '-1 hour' +%s\nexec /bin/date \"$@\"",
    )
    job = submit(slurm, stubbed, "--nodes=3", "--gpus-per-node=1", "slurm/evaluate.sh", "x", STUB_LATE="first")
    assert slurm.wait_end(job) == "COMPLETED", output(stubbed, job)
    first, *_ = (stubbed / "runs" / "slurm" / f"{job}.0" / "hosts").read_text().split()
    assert slurm.field(job, "ExcNodeList") == first
    assert re.search(rf"{first} bad: its clock is -3\d{{3}} s off that of most others", output(stubbed, job))


def test_a_node_that_cannot_be_reached_is_left_out_alone(slurm, stubbed):
    set_in_site(stubbed, "export OCTO_PREFLIGHT='sleep 25'")  # longer than srun tries to start a task
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
    shim(
        stubbed,
        "lost",
        f"[[ ! $SLURM_RESTART_COUNT && $SLURM_STEP_ID && $SLURM_NODEID == {bad} ]] && exec /nowhere/python\n"
        f'exec {stubbed}/bin/stub "$@"',
    )
    set_in_site(stubbed, f"OCTO_PYTHON={stubbed}/bin/lost")
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
