"""A save, an imported base, or a plain Megatron checkpoint: which folder it is, what model it holds, its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo import checksums, console, lineage, rundir
from megatron_octo.convert.hf_folder import read_model_config
from megatron_octo.convert.torch_dist import FORMAT_FILE, WEIGHT_FILES, Reader
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping
from megatron_octo.model.weights import EXTRA_STATE, MODEL_FILE, read_model

if TYPE_CHECKING:
    import torch

    from megatron_octo.config.model import ModelConfig

STEPS = "checkpoints/step_*"
LATEST = "latest_checkpointed_iteration.txt"
"""Of Megatron-LM, beside its iter_XXXXXXX folders."""
RELEASE = "release"
ITERATION = re.compile(rf"[0-9]{{1,18}}|{RELEASE}")
VOCABULARY = (mapping.EMBEDDING.key, mapping.OUTPUT.key)
"""Tensors that have a row for each id; Megatron-LM pads them."""
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""Starts of the keys of a model's tensors; all others are the optimizer's, or of `PREDICTION_KEYS`."""
PREDICTION_KEYS = "mtp."
"""Start of the keys of heads that predict further tokens: they help training, and no answer depends on them."""
SHOWN = 5
"""Keys in a message, of many."""


def find_save(path: Path) -> Path:
    """The folder of a save: `path` itself, or the newest good save of the run folder or Megatron-LM's folder `path`.

    A save that has checksums is read once, to compare it with them. A run's damaged saves are passed over, with a
    warning each.

    Raises:
        BadInput: it is none of these, or is damaged.
    """
    if not path.is_dir():
        raise BadInput(f"no folder {path}", fix="give a run folder, one of its checkpoints/step_*, or an imported base")
    if (path / MODEL_FILE).exists() or checksums.is_sealed(path):
        if damage := _damage(path):
            raise BadInput(
                f"the save {path} is damaged: {damage}",
                fix="give another save; a run's folder stands for its newest good one",
            )
        return path
    if (path / FORMAT_FILE).exists():
        return path
    if (path / LATEST).is_file():
        return find_save(path / _latest(path / LATEST))
    for save in sorted(path.glob(STEPS), reverse=True):
        damage = _damage(save)
        if not damage:
            return save
        console.logger(__name__).warning("%s is damaged (%s): passed over for the save before it", save, damage)
    raise BadInput(f"{path} has no whole save in {STEPS}", fix="train first, or give another folder")


def _latest(file: Path) -> str:
    """The folder that a file of Megatron-LM names: of an iteration, or `release`."""
    named = file.read_text(errors="replace").strip()
    if not ITERATION.fullmatch(named):
        raise BadInput(f"{file} names no iteration: {named[:40]!r}", fix="give the iter_XXXXXXX folder itself")
    return named if named == RELEASE else f"iter_{int(named):07d}"


def _damage(save: Path) -> str:
    """What is wrong with a save, empty if nothing is. An import is hashed when it is read (`to_hf`)."""
    if rundir.is_done(save) and not checksums.is_sealed(save):
        return ""
    return "; ".join(checksums.faults(save))


def model_of(folder: Path, config: Path | None) -> ModelConfig:
    """The model that a save holds: by its model.json, or of a plain checkpoint by the Hugging Face folder `config`.

    Raises:
        BadInput: `config` is missing, or one too many; or see `read_model`.
    """
    own = (folder / MODEL_FILE).exists()
    if own and config is not None:
        raise BadInput(f"{folder} says itself which model it holds", fix="leave --config out")
    if not own and config is None:
        raise BadInput(
            f"{folder} has no {MODEL_FILE}: it is a plain Megatron checkpoint, whose settings are a pickle",
            fix="give --config FOLDER, a Hugging Face folder of a model of this shape",
        )
    return read_model_config(config) if config else read_model(folder)


class Save:
    """The weights of one save, read one at a time; the optimizer's state is left alone.

    Of a plain checkpoint the rows beyond its vocabulary, which Megatron-LM adds, are left out.
    """

    def __init__(
        self, folder: Path, config: Path | None = None, on_read: Callable[[Path], object] | None = None
    ) -> None:
        """Read the index and compare it with the model, as `model_of` finds it.

        `on_read` hears of a file before each read from it, and reads it ahead.

        Raises:
            BadInput: not a save, or its tensors are not those of the model; `config` is missing, or one too many.
        """
        self.folder, self._config, self.model = folder, config, model_of(folder, config)
        self._reader = Reader(folder, on_read=on_read)
        self._keys = set(self._reader.keys())
        self.vocab_rows = self.model.vocab_size
        """Rows of the vocabulary in the files, padding included."""
        weights = list(mapping.weights(self.model))
        for weight in weights:
            self._check(weight)
        self._check_no_more(weights)

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """Megatron's tensor `key`, of layer `layer` where it is one of the layers'."""
        alone = per_layer(key, layer)
        tensor = self._reader.read(alone) if alone in self._keys else self._reader.read(key, layer)
        return tensor[: self.model.vocab_size] if key in VOCABULARY else tensor

    def warnings(self) -> Iterator[str]:
        """What nobody can check of a plain checkpoint, and what is left out of it: a sentence each."""
        if self._config is not None:
            unseen = "rotary base and scaling, epsilon of the norms"
            yield f"{self.folder}: {unseen} are those of {self._config}: no tensor shows whether it was trained so"
        if self.vocab_rows != self.model.vocab_size:
            rows = f"{self.vocab_rows:,} rows of a vocabulary of {self.model.vocab_size:,}"
            yield f"{self.folder} has {rows}: the rest is padding, and left out"
        heads = [key for key in self._keys if key.startswith(PREDICTION_KEYS) and EXTRA_STATE not in key]
        if heads:
            yield f"{self.folder} has {len(heads)} tensors ({PREDICTION_KEYS}) that predict further tokens: left out"

    def lineage(self) -> lineage.Lineage:
        """That of the save; of a plain checkpoint, what its folder's name and `config` tell."""
        if self._config is None:
            return lineage.read(self.folder)
        digits = self.folder.name.removeprefix("iter_")
        return lineage.Lineage(
            name=self.folder.resolve().parent.name,
            kind="train",
            weights_sha256=rundir.sha256_folder(self.folder, WEIGHT_FILES),
            step=int(digits) if digits.isdigit() else None,
            parent=lineage.Lineage(name=self._config.resolve().name, kind="base", weights_sha256=""),
        )

    def _check(self, weight: mapping.Weight) -> None:
        alone = per_layer(weight.key, weight.layer)
        key, shape = weight.key, mapping.stacked_shape(weight, self.model)
        if alone in self._keys:
            key, shape = alone, weight.shape
        found = self._reader.shape(key)
        may_be_padded = key in VOCABULARY and self._config is not None
        if may_be_padded and found[1:] == shape[1:] and found[0] >= shape[0]:
            self.vocab_rows = found[0]
        elif found != shape:
            raise BadInput(
                f"{self.folder}: {key} is {found}, the model of {self._config or MODEL_FILE} has {shape}",
                fix=self._fix(),
            )

    def _check_no_more(self, weights: Sequence[mapping.Weight]) -> None:
        known = {key for each in weights for key in (each.key, per_layer(each.key, each.layer))}
        more = sorted(key for key in self._keys - known if key.startswith(MODEL_KEYS) and EXTRA_STATE not in key)
        if more:
            raise BadInput(
                f"{self.folder} holds {len(more)} tensors that the model of {self._config or MODEL_FILE} has not: "
                f"{', '.join(more[:SHOWN])}",
                fix=self._fix(),
            )

    def _fix(self) -> str:
        return "give --config of this model" if self._config else "do not edit a save's files; take another save"


def per_layer(key: str, layer: int | None) -> str:
    """The key that megatron gives a layer's tensor when it does not stack the layers."""
    return key if layer is None else key.replace(mapping.LAYERS, f"{mapping.LAYERS}{layer}.", 1)
