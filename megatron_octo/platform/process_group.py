"""Process groups: who this rank is, by the launcher's environment variables, and megatron's groups around a block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_octo.errors import BadInput

if TYPE_CHECKING:
    from megatron_octo.config.train import ParallelConfig
    from megatron_octo.platform import Platform

LAUNCHERS_PREFIXES = ("TORCHELASTIC_", "SLURM_STEP_")
LAUNCHERS_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID"),
)
BLACKWELL = (10, 0)  # compute capability
PIPELINE_SEED_OFFSET = 100  # stages draw different weights; megatron's own convention


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among those started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this host; chooses the GPU."""


def started_by_launcher() -> bool:
    """Whether torchrun, or srun with several tasks, started this process."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def launchers_variables() -> list[str]:
    """What torchrun or srun put into this environment, and a child that is no rank must not inherit."""
    return [name for name in os.environ if name in LAUNCHERS_VARIABLES or name.startswith(LAUNCHERS_PREFIXES)]


def world() -> World:
    """This process's place: as torchrun states it, else as srun does, else alone. Reads the environment only.

    Raises:
        BadInput: started by srun with several tasks, but without an address to meet at.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(
            rank=int(env["RANK"]), size=int(env["WORLD_SIZE"]), local_rank=int(env.get("LOCAL_RANK", env["RANK"]))
        )
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))  # unset in a batch script itself, whatever --ntasks is
    if tasks == 1:
        return World()
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise BadInput(
            f"srun started {tasks} tasks and MASTER_ADDR or MASTER_PORT is not set",
            fix="export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1) and a free MASTER_PORT",
        )
    return World(
        rank=int(env["SLURM_PROCID"]), size=tasks, local_rank=int(env.get("SLURM_LOCALID", env["SLURM_PROCID"]))
    )


@contextlib.contextmanager
def model_parallel(
    platform: Platform, parallel: ParallelConfig, *, seed: int = 0, cuda_graphs: bool = False
) -> Iterator[None]:
    """Megatron's groups and seeds for the block; all ranks enter it together.

    Activates the platform. An initialised process group is used and left as it is; otherwise one is made from
    `world()`, without a port when this process is alone, and destroyed at the end.
    With `cuda_graphs` the random states are Transformer Engine's, which a graph can record.
    """
    import torch
    import torch.distributed as dist

    me = world()
    if platform.device == "cuda":
        _order_kernels(platform, parallel)
        torch.cuda.set_device(me.local_rank)
    platform.activate()
    from megatron.core import parallel_state, tensor_parallel

    with contextlib.nullcontext() if dist.is_initialized() else _process_group(platform, me):
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor,
                pipeline_model_parallel_size=parallel.pipeline,
                virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
                context_parallel_size=parallel.context,
            )
            stage_seed = seed + PIPELINE_SEED_OFFSET * parallel_state.get_pipeline_model_parallel_rank()
            torch.manual_seed(stage_seed)
            tensor_parallel.model_parallel_cuda_manual_seed(
                stage_seed, te_rng_tracker=cuda_graphs, force_reset_rng=cuda_graphs
            )
            yield
        finally:
            parallel_state.destroy_model_parallel()


def _order_kernels(platform: Platform, parallel: ParallelConfig) -> None:
    """One hardware queue under tensor parallelism, unless the user chose: communication starts before what hides it.

    megatron's layers rely on it (`core/tensor_parallel/layers.py`); from Blackwell on they need not, and FSDP's
    gathers want several.
    """
    if parallel.tensor > 1 and not parallel.fsdp and platform.chip < BLACKWELL:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


@contextlib.contextmanager
def _process_group(platform: Platform, me: World) -> Iterator[None]:
    """A process group for the block. The environment says who this rank is, for logs and for megatron.

    A process that is alone has its environment back afterwards; ranks still have to be told apart in the logs.
    """
    import torch.distributed as dist

    said = {"RANK": str(me.rank), "WORLD_SIZE": str(me.size), "LOCAL_RANK": str(me.local_rank)}
    new = said.keys() - os.environ.keys()
    os.environ |= said
    if me.size == 1:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(platform.backend)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name in new if me.size == 1 else ():
            del os.environ[name]
