"""Pickles inside a checkpoint, read without the power to run code.

torch and megatron unpickle three things of a save: its index `.metadata`; the blobs of objects (random states, the
optimizer's numbers), by torch.load; and a layer's own record, `_extra_state` (Transformer Engine's scales). Here the
first and the last may name the few classes that describe numbers, and torch.load is kept to its `weights_only`.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from megatron_octo.errors import BadInput

INDEX = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_RECIPE = "transformer_engine.common.recipe"
Names = Collection[tuple[str, str]]
IN_INDEX: Names = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_PLANNER, "BytesIOWriteData"),
    (_PLANNER, "SavePlan"),
    (_PLANNER, "TensorWriteData"),
    (_PLANNER, "WriteItem"),
    (_PLANNER, "WriteItemType"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""(module, name) that an index may refer to, besides torch's number formats: descriptions without side effects."""
TENSOR_LOADERS: Names = {("megatron.core.safe_globals", "safe_load_from_bytes"), ("torch.storage", "_load_from_bytes")}
"""What a pickled tensor refers to: torch's function, or the one that megatron puts in its place once it is imported."""
IN_RECORD: Names = {
    (_RECIPE, "DelayedScaling"),
    (_RECIPE, "Float8BlockScaling"),
    (_RECIPE, "Float8CurrentScaling"),
    (_RECIPE, "Format"),
    (_RECIPE, "MMParams"),
    (_RECIPE, "MXFP8BlockScaling"),
    (_RECIPE, "NVFP4BlockScaling"),
    (_RECIPE, "QParams"),
    (_RECIPE, "_FormatHelper"),
    ("collections", "OrderedDict"),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
    ("torch._utils", "_rebuild_tensor_v2"),
    *TENSOR_LOADERS,
}
"""(module, name) that a layer's record may refer to: a recipe's numbers, and tensors."""


class _Unpickler(pickle.Unpickler):
    """Makes what a list allows and nothing else."""

    def __init__(self, data: bytes, allowed: Names, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed, self._where = allowed, where

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in self._allowed:
            raise BadInput(
                f"{self._where} refers to {module}.{name}, which describes no tensor: it was not loaded",
                fix="do not load this checkpoint with other tools either, unless you know who wrote it",
            )
        if (module, name) in TENSOR_LOADERS:
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        return super().find_class(module, name)


def read_index(folder: Path) -> Any:
    """The index of a torch_dist folder, torch's `Metadata`.

    Raises:
        BadInput: there is none; it is torn, or refers to what it must not.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = folder / INDEX
    if not path.is_file():
        raise BadInput(f"{folder} is no megatron checkpoint: it has no {INDEX}", fix="give the folder of one save")
    try:
        index = _Unpickler(path.read_bytes(), IN_INDEX, "the index of this checkpoint").load()
        sound = isinstance(index, Metadata) and _is_sound(index)
    except BadInput:
        raise
    except Exception as error:  # a torn pickle fails in any way
        raise BadInput(f"{path} is torn: {error}", fix="take another save") from None
    if not sound:
        raise BadInput(f"{path} is no index of tensors, or a damaged one", fix="take another save")
    return index


def _is_sound(index: Any) -> bool:
    """Whether the fields that are read of an index are of their kinds; fails in any way where one is missing."""
    import torch
    from torch.distributed.checkpoint import metadata

    def is_tensor(entry: Any) -> bool:
        shapes = [entry.size, *(shape for chunk in entry.chunks for shape in (chunk.offsets, chunk.sizes))]
        return isinstance(entry.properties.dtype, torch.dtype) and all(
            isinstance(shape, torch.Size) and len(shape) == len(entry.size) and min(shape, default=0) >= 0
            for shape in shapes
        )

    return all(
        isinstance(key, str)
        and (
            isinstance(entry, metadata.BytesStorageMetadata)
            or (isinstance(entry, metadata.TensorStorageMetadata) and is_tensor(entry))
        )
        for key, entry in index.state_dict_metadata.items()
    ) and all(
        isinstance(where, metadata.MetadataIndex)
        and isinstance(info.relative_path, str)
        and type(info.offset) is type(info.length) is int
        and min(info.offset, info.length) >= 0
        for where, info in index.storage_data.items()
    )


def check_record(key: str, record: Any) -> None:
    """Refuse a layer's own record, loaded under `key`, that runs code when Transformer Engine unpickles it.

    Raises:
        BadInput: it refers to what it must not.
    """
    import torch

    if isinstance(record, torch.Tensor) and record.numel():
        _Unpickler(record.cpu().numpy().tobytes(), IN_RECORD, f"the record {key}").load()


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Within the block every torch.load of this process, megatron's included, makes tensors and plain values only."""
    with _switched_on("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        yield


@contextlib.contextmanager
def records_checked() -> Iterator[None]:
    """Within the block Transformer Engine unpickles layers' records, all of which `check_record` has passed."""
    with _switched_on("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"):
        yield


@contextlib.contextmanager
def _switched_on(*names: str) -> Iterator[None]:
    """Within the block the first of these environment variables is 1 and the others are not set."""
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
