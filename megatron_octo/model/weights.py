"""Weights of a model in a torch_dist folder: one layout for imports and for a run's saves.

Keys are megatron's, without a prefix: `embedding.word_embeddings.weight`,
`decoder.layers.self_attention.linear_qkv.weight` with all layers stacked on axis 0, and so on. They are the
same whichever layers made them and however the model was cut, so any layout reads any folder.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_octo import lineage
from megatron_octo.config.base import read_settings, to_dict
from megatron_octo.config.model import ModelConfig
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.model.untrusted import check_record, read_index, records_checked, weights_only
from megatron_octo.rundir import differences, sha256

MODEL_FILE = "model.json"
EXTRA_STATE = "_extra_state"  # a layer's own record (FP8 scales), in a run's saves only: an import has weights alone
NOT_IN_WEIGHTS = ("max_positions", "init_std")  # fields of a ModelConfig that no weight depends on


def sharded_weights(chunks: Sequence[Any]) -> dict[str, Any]:
    """This rank's part of the weights, as dist_checkpointing takes it. `chunks` are bare GPTModels."""
    return {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}


def load_sharded(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What megatron loads of a torch_dist folder; nothing in it is unpickled that could run code. All ranks call it.

    Raises:
        BadInput: the folder has no index, lacks something, or has pickles that refer to more than numbers.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from torch.distributed.checkpoint import CheckpointException

    read_index(folder)
    unrounded = TorchDistLoadShardedStrategy(stream_ckpt_dequant=False)  # else FP8 weights are rounded piece by piece
    try:
        with weights_only():
            loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder), unrounded)
    except (CheckpointException, pickle.UnpicklingError) as error:
        found = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        lines = str(found).splitlines()
        reason = next((line for line in lines if "GLOBAL" in line), lines[0])  # torch's advice around it is unsafe
        raise BadInput(f"{folder} was not loaded: {reason.strip()}", fix="use another save") from None
    return loaded


def put_weights(chunks: Sequence[Any], loaded: Mapping[str, Any]) -> None:
    """Put what `load_sharded` returned for `sharded_weights` into the chunks."""
    for index, chunk in enumerate(chunks):
        for key, value in loaded[f"model{index}"].items():
            if key.endswith(EXTRA_STATE):
                check_record(key, value)
        with records_checked():
            keys = chunk.load_state_dict(_as_shards(chunk, loaded[f"model{index}"]), strict=False)
        wrong = [*keys.unexpected_keys, *(key for key in keys.missing_keys if not key.endswith(EXTRA_STATE))]
        if wrong:
            raise OctoError(f"the checkpoint and the model do not fit: {', '.join(wrong[:5])}", fix="use another save")


def _as_shards(chunk: Any, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """What was loaded; under FSDP it is this rank's rows of each weight, and says so."""
    from torch.distributed.tensor import DTensor

    def shard(weight: Any, rows: Any) -> Any:
        if not isinstance(weight, DTensor):
            return rows
        return DTensor.from_local(
            rows, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
        )

    weights = dict(chunk.named_parameters())
    return {key: shard(weights.get(key), value) for key, value in loaded.items()}


def load_weights(chunks: Sequence[Any], folder: Path) -> dict[str, Any]:
    """Fill the chunks with the weights in `folder`, however the model that wrote them was cut; returns them as read.

    All ranks call it.
    """
    wanted = {
        name: {key: entry for key, entry in part.items() if not key.endswith(EXTRA_STATE)}
        for name, part in sharded_weights(chunks).items()
    }
    loaded = load_sharded(wanted, folder)
    put_weights(chunks, loaded)
    return loaded


def read_model(folder: Path) -> ModelConfig:
    """The model whose weights are in `folder`, by its model.json.

    Raises:
        BadInput: it has none, or that of an import was changed since (a save's is in its SHA256SUMS).
    """
    path, link = folder / MODEL_FILE, lineage.read_if_present(folder)
    model = read_settings(ModelConfig, path)
    if link is not None and link.kind == "import" and link.recipe_sha256 not in ("", sha256(path)):
        raise BadInput(f"{path} was changed since it was written", fix="import again: octo convert from-hf --overwrite")
    return model


def check_shape(config: ModelConfig, folder: Path) -> None:
    """Refuse weights of another model; reads `folder/model.json` only.

    Raises:
        BadInput: a field that the weights depend on differs.
    """
    there = to_dict(read_model(folder))  # a field that it lacks has its default
    differing = [each for each in differences(there, to_dict(config)) if each[0] not in NOT_IN_WEIGHTS]
    if differing:
        lines = "\n".join(f"  model.{name}: {old!r} there, {new!r} asked for" for name, old, new in differing)
        raise BadInput(
            f"the weights in {folder} are of another model:\n{lines}", fix="correct the recipe's model section"
        )
