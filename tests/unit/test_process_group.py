"""Who a rank is, by the launcher's environment."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_octo.errors import BadInput
from megatron_octo.platform.process_group import World, started_by_launcher, world

VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No launcher."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _set(monkeypatch, **values: object) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_without_a_launcher_is_alone():
    assert world() == World(rank=0, size=1, local_rank=0)
    assert not started_by_launcher()


def test_torchruns_variables(monkeypatch):
    _set(monkeypatch, RANK=9, WORLD_SIZE=16, LOCAL_RANK=1)
    assert world() == World(rank=9, size=16, local_rank=1)
    assert started_by_launcher()


def test_sruns_variables(monkeypatch):
    _set(monkeypatch, SLURM_PROCID=9, SLURM_STEP_NUM_TASKS=16, SLURM_LOCALID=1, MASTER_ADDR="a", MASTER_PORT=1)
    assert world() == World(rank=9, size=16, local_rank=1)


def test_a_batch_script_without_srun_is_alone(monkeypatch):
    _set(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=16)
    assert world().size == 1


def test_srun_without_an_address_to_meet_at(monkeypatch):
    _set(monkeypatch, SLURM_PROCID=1, SLURM_STEP_NUM_TASKS=2)
    with pytest.raises(BadInput, match="MASTER_ADDR"):
        world()


COUNT_POLLS = """
import os
from megatron_octo.config.train import ParallelConfig
from megatron_octo.platform import resolve
from megatron_octo.platform.process_group import model_parallel

for _ in range(2):
    with model_parallel(resolve(), ParallelConfig()):
        links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        print("polls", sum("eventpoll" in link for link in links))
"""


def test_all_groups_on_a_cpu_are_polled_by_one_thread():
    done = subprocess.run([sys.executable, "-c", COUNT_POLLS], capture_output=True, text=True, check=False)
    assert done.stdout.count("polls 1\n") == 2, done.stdout + done.stderr
