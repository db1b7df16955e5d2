"""Saves: a folder that appears whole or not at all, readable by any layout.

checkpoints/step_XXXXXXXX/ holds megatron's torch_dist files (weights under `model/weights.py`'s keys, the
optimizer in its fully reshardable form, random states), state.json, ledger.json, config.json, model.json,
lineage.json, the base's licence, SHA256SUMS and DONE.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import checksums, lineage, rundir
from megatron_octo.config.base import fingerprint, to_dict
from megatron_octo.console import logger
from megatron_octo.errors import OctoError
from megatron_octo.model.weights import EXTRA_STATE, MODEL_FILE, load_sharded, put_weights, sharded_weights
from megatron_octo.platform import checkpoint_writer
from megatron_octo.train.distributed import on_source, together
from megatron_octo.train.optimizer import round_weights

if TYPE_CHECKING:
    from megatron_octo.config.train import MidTrainConfig
    from megatron_octo.train.state import TrainState

OPTIMIZER_FORM = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
FIX = "see to the disk; run again, it goes on from the last whole save"


class Writing:
    """A save on its way to the disk: a thread of each rank writes copies of its tensors, while training goes on."""

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        *,
        config: MidTrainConfig,
        chunks: Sequence[Any],
        wrapped: Sequence[Any],
        optimizer: Any,
        ledger: dict[str, Any],
        parent: lineage.Lineage | None,
    ) -> None:
        """Copy the tensors and start the threads. All ranks call it; `ledger` counts on rank 0 only.

        Raises:
            OctoError: rank 0 cannot make the temporary folder; on all ranks alike.
        """
        from megatron.core import dist_checkpointing

        self.folder, self._state, self._config = folder, state, config
        self._ledger, self._parent = ledger, parent
        self._what = f"{folder} was not saved"
        self._temporary = on_source(self._what, lambda: rundir.temporary_folder(folder), fix=FIX)
        with _gathered_weights(wrapped, config):
            self._request = dist_checkpointing.save(
                _sharded(chunks, optimizer, is_loading=False),
                str(self._temporary),
                sharded_strategy=_shared_writing(),
                async_sharded_save=True,
                async_strategy="mcore",
            )
            checkpoint_writer.copy_to_host(self._request)
        self._sums = _in_thread(self._write)

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are on the disk, or failed."""
        return self._sums.done()

    def finish(self) -> None:
        """Wait for all ranks' files; then rank 0 writes the rest, seals the folder and gives it its name.

        All ranks call it.

        Raises:
            OctoError: a file cannot be written; nothing is left of the save.
        """
        try:
            written = together(self._what, self._sums.result, fix=FIX)
            known = {name: digest for sums in written for name, digest in sums.items()}
            for collect in self._request.finalize_fns:  # megatron's index, on rank 0
                collect()
            on_source(self._what, lambda: self._publish(known), fix=FIX)
        except (OctoError, OSError) as error:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise error if isinstance(error, OctoError) else OctoError(f"{self._what}: {error}", fix=FIX) from error

    def _write(self) -> dict[str, str]:
        return {path.name: rundir.sha256(path) for path in checkpoint_writer.write(self._request)}

    def _publish(self, known: dict[str, str]) -> None:
        """What rank 0 does when all tensors are on disk; `known` has the SHA-256 of the files that hold them."""
        folder = self._temporary
        self._state.write(folder)
        rundir.write_json(folder / "ledger.json", self._ledger)
        rundir.write_json(folder / "config.json", to_dict(self._config))
        rundir.write_json(folder / MODEL_FILE, to_dict(self._config.model))
        digest = rundir.sha256_files(known)
        lineage.write(folder, link(self._config, self._parent, self._state, weights_sha256=digest))
        lineage.copy_licence(self.folder.parents[1], folder)  # the run's, which has it of what it started from
        checksums.seal(folder, known)
        rundir.publish(folder, self.folder)


def load(folder: Path, *, chunks: Sequence[Any], optimizer: Any | None, same_layout: bool) -> dict[str, Any]:
    """Fill the chunks, and the optimizer if given, from a save of any layout; returns what was read of it.

    All ranks call it.

    Args:
        folder: a whole save.
        chunks: bare GPTModels.
        optimizer: None to leave its moments as they are.
        same_layout: whether ranks and layers are those that saved; only then do random states and the layers' own
            records (FP8 scales) mean anything, and come back too.
    """
    wanted = _sharded(chunks, optimizer, is_loading=True)
    if not same_layout:
        del wanted["random"]
        for index in range(len(chunks)):
            part = wanted[f"model{index}"]
            wanted[f"model{index}"] = {key: entry for key, entry in part.items() if not key.endswith(EXTRA_STATE)}
    loaded = load_sharded(wanted, folder)
    put_weights(chunks, loaded)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        if chunks[0].config.fp8_param:
            round_weights(optimizer)
    if same_layout:
        _set_random_states(loaded["random"])
    return loaded


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

    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": {name: tensor_parallel.convert_cuda_rng_state(state) for name, state in tracked.items()},
    }
    return ShardedObject(
        "random",
        states,
        (groups.get_pipeline_model_parallel_world_size(), groups.get_tensor_model_parallel_world_size()),
        (groups.get_pipeline_model_parallel_rank(), groups.get_tensor_model_parallel_rank()),
        replica_id=groups.get_data_parallel_rank(with_context_parallel=True),
    )


def _set_random_states(states: dict[str, Any]) -> None:
    """Go on with the save's random states; those of another kind of device stay as the seed made them."""
    import torch
    from megatron.core import tensor_parallel

    torch.set_rng_state(states["cpu"])
    if states["device"].shape != torch.cuda.get_rng_state().shape:
        logger(__name__).warning("the save is another kind of device's: random states go on from the seed, not from it")
        return
    tracker = tensor_parallel.get_cuda_rng_tracker()
    recorded = tensor_parallel.is_graph_safe_cuda_rng_tracker(tracker)  # under CUDA graphs: generators, not tensors
    torch.cuda.set_rng_state(states["device"])
    tracker.set_states(
        {
            name: tensor_parallel.convert_cuda_rng_state(state, to_graphable=recorded)
            for name, state in states["tracker"].items()
        }
    )


def _in_thread[T](work: Callable[[], T]) -> Future[T]:
    """Do `work` in a thread that keeps no process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _shared_writing() -> Any:
    """Megatron's way to share out among data-parallel ranks what they all hold."""
    from megatron.core import parallel_state as groups
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    everyone = groups.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), everyone)
