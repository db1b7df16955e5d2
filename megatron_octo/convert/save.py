"""A save, or an imported base: which folder it is, what model it holds, its weights by key and layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo import rundir
from megatron_octo.config.base import read_settings
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.torch_dist import Reader
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping
from megatron_octo.model.weights import MODEL_FILE

if TYPE_CHECKING:
    import torch

STEPS = "checkpoints/step_*"


def find_save(path: Path) -> Path:
    """The folder of a save: `path` itself, or the last whole save of the run folder `path`.

    Raises:
        BadInput: neither.
    """
    if not path.is_dir():
        raise BadInput(f"no folder {path}", fix="give a run folder, one of its checkpoints/step_*, or an imported base")
    if (path / MODEL_FILE).exists():
        if not rundir.is_done(path):
            raise BadInput(f"save {path} is torn: it has no {rundir.DONE}", fix="give another save")
        return path
    whole = sorted(step for step in path.glob(STEPS) if rundir.is_done(step))
    if not whole:
        raise BadInput(f"{path} has no whole save in {STEPS}", fix="train first, or give another folder")
    return whole[-1]


class Save:
    """The weights of one save, read one at a time; the optimizer's state is left alone."""

    def __init__(self, folder: Path) -> None:
        """Read the index and compare it with the model.

        Raises:
            BadInput: not a save, or its tensors are not those of the model in its model.json.
        """
        self.folder = folder
        self.model = read_settings(ModelConfig, folder / MODEL_FILE)
        self._reader = Reader(folder)
        self._keys = set(self._reader.keys())
        for weight in mapping.weights(self.model):
            self._check(weight)

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """Megatron's tensor `key`, of layer `layer` where it is one of the layers'."""
        per_layer = _per_layer(key, layer)
        return self._reader.read(per_layer) if per_layer in self._keys else self._reader.read(key, layer)

    def _check(self, weight: mapping.Weight) -> None:
        per_layer = _per_layer(weight.key, weight.layer)
        key, shape = weight.key, mapping.stacked_shape(weight, self.model)
        if per_layer in self._keys:
            key, shape = per_layer, weight.shape
        found = self._reader.shape(key)
        if found != shape:
            raise BadInput(
                f"{self.folder}: {key} is {found}, the model of {MODEL_FILE} has {shape}",
                fix="do not edit a save's files; take another save",
            )


def _per_layer(key: str, layer: int | None) -> str:
    """The key that megatron gives a layer's tensor when it does not stack the layers."""
    return key if layer is None else key.replace(mapping.LAYERS, f"{mapping.LAYERS}{layer}.", 1)
