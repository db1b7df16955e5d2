"""Real RL on two nodes of a Slurm job, killed on the way and told of its time limit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.rl import saves
from megatron_octo.rl.cluster import token_environment
from megatron_octo.rl.collect import read_metrics
from megatron_octo.rl.run import has_gpu
from megatron_octo.rl.watch import MOST_VLLM_KL_CPU
from tests.rl.conftest import two_steps
from tests.rl.test_nodes import enters, on_two_nodes
from tests.slurm.cluster import Cluster, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(has_gpu(), reason="the tiny model is for machines without a GPU"),
]
JOB_TIMEOUT_S = 1200
NUM_STEPS = 10  # two passes; seconds each, so that all that is to happen does before the end


def node_tasks(slurm: Cluster, job: str) -> dict[str, int]:
    """{node: process id} of the tasks that a job's nodes run."""
    return {
        node: pid for pid, argv, node in slurm.processes(job) if argv[1:5] == ["-m", "megatron_octo", "slurm", "node"]
    }


def test_rl_on_two_nodes_goes_on_after_a_kill_and_after_a_time_limit(slurm: Cluster, checkout: Path) -> None:
    config = on_two_nodes(two_steps(checkout, checkout / "model"), num_steps=NUM_STEPS)
    rundir.write_json(checkout / "rl.json", to_dict(config))
    shape = ["--nodes=2", "--gpus-per-node=1"]
    job = slurm("sbatch", "--parsable", *shape, "slurm/rl.sh", "--recipe", checkout / "rl.json", cwd=checkout)

    def said() -> str:
        return next((checkout / "slurm" / "logs").glob(f"rl-{job}.out")).read_text()

    token = checkout / "runs" / "slurm" / f"{job}.0" / "ray_token"
    slurm.wait(job, lambda: token.with_name("ray_has_begun").exists() or slurm.state(job) == "FAILED", JOB_TIMEOUT_S)
    assert slurm.state(job) == "RUNNING", said()
    assert token.stat().st_mode & 0o777 == 0o600
    address = f"127.0.0.1:{20_000 + int(job) % 20_000}"
    assert enters(address, token_environment(token))
    assert not enters(address, {})

    def wait_for_a_save(after: int) -> None:
        slurm.wait(job, lambda: saves.last(config.output) > after or slurm.state(job) == "FAILED", JOB_TIMEOUT_S)
        assert slurm.state(job) == "RUNNING", said()

    def restarts() -> int:
        return int(slurm.field(job, "Restarts"))

    wait_for_a_save(after=0)
    tasks = node_tasks(slurm, job)
    assert set(tasks) == {"node1", "node2"}
    os.kill(tasks["node2"], signal.SIGKILL)
    slurm.wait(job, lambda: restarts() == 1)
    assert not token.exists(), "the token outlives the start"

    wait_for_a_save(after=saves.last(config.output))
    before = restarts()
    slurm("scancel", "--batch", "--signal=USR1", job)  # as before the limit: Slurm looks for those twice a minute only
    slurm.wait(job, lambda: restarts() > before)
    assert "SIGUSR1: the tasks are asked to save and to end" in said()
    assert slurm.wait_end(job, JOB_TIMEOUT_S) == "COMPLETED", said()

    rows = read_metrics(config.output / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert all(abs(row["rl/vllm_kl"]) < MOST_VLLM_KL_CPU for row in rows)
    assert all(row["optim/grad_norm"] > 0 or row["rl/accuracy"] == 1.0 for row in rows), "all right, nothing to learn"
    assert rundir.is_done(config.output)
    for restart in (1, restarts()):
        ranks = (checkout / "runs" / "slurm" / f"{job}.{restart}" / "ranks.txt").read_text()
        assert "goes on after step" in ranks
    wait_for(lambda: not list(slurm.processes(job)))  # the batch script's last breath included
