"""Who a rank is, by the launcher's environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_octo.config.train import ParallelConfig
from megatron_octo.errors import BadInput
from megatron_octo.platform import Platform
from megatron_octo.platform.process_group import World, _order_kernels, started_by_launcher, world

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


ENTER_TWICE = """
import os
from megatron_octo.config.train import ParallelConfig
from megatron_octo.platform import resolve
from megatron_octo.platform.process_group import launchers_variables, model_parallel

before = set(launchers_variables())
for _ in range(2):
    with model_parallel(resolve(), ParallelConfig()):
        links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        print("polls", sum("eventpoll" in link for link in links), sorted({*launchers_variables()} - before))
    print("left", {*launchers_variables()} - before)
"""


def test_all_groups_on_a_cpu_are_polled_by_one_thread_and_leave_the_environment_as_it_was():
    done = subprocess.run([sys.executable, "-c", ENTER_TWICE], capture_output=True, text=True, check=False)
    lines = ["polls 1 ['LOCAL_RANK', 'RANK', 'WORLD_SIZE']", "left set()"]
    assert done.stdout.splitlines() == lines * 2, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("chip", "parallel", "queues"),
    [
        ((9, 0), ParallelConfig(tensor=2), "1"),
        ((9, 0), ParallelConfig(), None),
        ((9, 0), ParallelConfig(tensor=2, fsdp=True, distributed_optimizer=False), None),
        ((10, 0), ParallelConfig(tensor=2), None),
    ],
)
def test_one_hardware_queue_under_tensor_parallelism(monkeypatch, chip, parallel, queues):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")  # for its end
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    gpu = Platform(device="cuda", backend="nccl", layer_family="transformer_engine", chip=chip)
    _order_kernels(gpu, parallel)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == queues


def test_the_users_hardware_queues_stand(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    gpu = Platform(device="cuda", backend="nccl", layer_family="transformer_engine", chip=(9, 0))
    _order_kernels(gpu, ParallelConfig(tensor=2))
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
