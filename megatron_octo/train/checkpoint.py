"""Saves: a folder that appears whole or not at all, readable by any layout.

checkpoints/step_XXXXXXXX/ holds megatron's torch_dist files (weights under `model/weights.py`'s keys, the
optimizer in its fully reshardable form, random states), state.json, ledger.json, config.json, model.json,
lineage.json and DONE. `checkpoints/latest` names the last step, for people and other tools.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import lineage
from megatron_octo.config.base import fingerprint, to_dict
from megatron_octo.console import logger
from megatron_octo.model.weights import EXTRA_STATE, MODEL_FILE, put_weights, sharded_weights
from megatron_octo.rundir import new_folder, sha256_folder, step_folder, write_atomic, write_json
from megatron_octo.train.distributed import from_source
from megatron_octo.train.state import TrainState, saved_steps

if TYPE_CHECKING:
    from megatron_octo.config.train import MidTrainConfig

WEIGHT_FILES = "*.distcp"
OPTIMIZER_FORM = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(
    run: Path,
    state: TrainState,
    *,
    config: MidTrainConfig,
    chunks: Sequence[Any],
    wrapped: Sequence[Any],
    optimizer: Any,
    ledger: dict[str, Any],
    parent: lineage.Lineage | None,
    in_use: Collection[int] = (),
) -> None:
    """Write the save of `state.step` and remove the oldest beyond `save.keep_last`. All ranks call it.

    Rank 0 names the temporary folder, all ranks write tensors into it, rank 0 writes the rest and renames it.
    `ledger` counts on rank 0 only, and so does `in_use`, the steps whose saves stay because something reads them.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    folder, is_source = step_folder(run, state.step), dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(new_folder(folder)) if is_source else None
        temporary: Path = from_source(ours)
        with _gathered_weights(wrapped, config):
            tensors = _sharded(chunks, optimizer, is_loading=False)
            dist_checkpointing.save(tensors, str(temporary))
        if is_source:
            _write_records(temporary, state, config, ledger, parent)
    if is_source:
        write_atomic(folder.parent / "latest", f"{state.step}\n")
        for step in set(saved_steps(run)[: -config.save.keep_last]).difference(in_use):
            shutil.rmtree(step_folder(run, step))
        logger(__name__).info("saved %s", folder)
    dist.barrier()


def load(folder: Path, *, chunks: Sequence[Any], optimizer: Any | None, same_layout: bool) -> None:
    """Fill the chunks, and the optimizer if given, from a save of any layout. All ranks call it.

    Args:
        folder: a whole save.
        chunks: bare GPTModels.
        optimizer: None to leave its moments as they are.
        same_layout: whether ranks and layers are those that saved; only then do random states and the layers' own
            records (FP8 scales) mean anything, and come back too.
    """
    from megatron.core import dist_checkpointing

    wanted = _sharded(chunks, optimizer, is_loading=True)
    if not same_layout:
        del wanted["random"]
        for index in range(len(chunks)):
            part = wanted[f"model{index}"]
            wanted[f"model{index}"] = {key: entry for key, entry in part.items() if not key.endswith(EXTRA_STATE)}
    loaded = dist_checkpointing.load(wanted, str(folder))
    put_weights(chunks, loaded)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        _set_random_states(loaded["random"])


def _write_records(
    folder: Path, state: TrainState, config: MidTrainConfig, ledger: dict[str, Any], parent: lineage.Lineage | None
) -> None:
    state.write(folder)
    write_json(folder / "ledger.json", ledger)
    write_json(folder / "config.json", to_dict(config))
    write_json(folder / MODEL_FILE, to_dict(config.model))
    lineage.write(folder, link(config, parent, state, weights_sha256=sha256_folder(folder, WEIGHT_FILES)))


def link(
    config: MidTrainConfig, parent: lineage.Lineage | None, state: TrainState, *, weights_sha256: str = ""
) -> lineage.Lineage:
    """This stage's link of the descent at `state`."""
    return lineage.Lineage(
        name=config.name,
        kind="train",
        weights_sha256=weights_sha256,
        step=state.step,
        tokens=state.tokens,
        recipe_sha256=fingerprint(config),
        data=state.data,
        code=lineage.code_version(),
        parent=parent,
    )


def _sharded(chunks: Sequence[Any], optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    """This rank's share of a save, or of what to read from one."""
    weights = sharded_weights(chunks)
    tensors = {**weights, "random": _random_states()}
    if optimizer is not None:
        tensors["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=OPTIMIZER_FORM)
    return tensors


@contextlib.contextmanager
def _gathered_weights(wrapped: Sequence[Any], config: MidTrainConfig) -> Any:
    """Under overlap_param_gather the update's result is gathered only by the next forward pass; gather it now."""
    if config.parallel.overlap_param_gather:
        for chunk in wrapped:
            chunk.disable_forward_pre_hook(param_sync=True)
    yield
    if config.parallel.overlap_param_gather:
        for chunk in wrapped:
            chunk.enable_forward_pre_hook()


def _random_states() -> Any:
    """This rank's random states, one entry a pipeline and tensor rank; data ranks share theirs."""
    import torch
    from megatron.core import parallel_state as groups
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "random",
        states,
        (groups.get_pipeline_model_parallel_world_size(), groups.get_tensor_model_parallel_world_size()),
        (groups.get_pipeline_model_parallel_rank(), groups.get_tensor_model_parallel_rank()),
        replica_id=groups.get_data_parallel_rank(with_context_parallel=True),
    )


def _set_random_states(states: dict[str, Any]) -> None:
    import torch
    from megatron.core import tensor_parallel

    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    torch.set_rng_state(states["cpu"])
