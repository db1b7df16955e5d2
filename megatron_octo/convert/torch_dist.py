"""Megatron's `torch_dist` folders, read and written one tensor at a time: no ranks, no process group, no GPU.

Nothing of it is unpickled that could run code: the index by `model/untrusted.py`, tensors with `weights_only`, and
byte blobs (`_extra_state`, the common state) are never opened.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from megatron_octo import console
from megatron_octo.errors import BadInput
from megatron_octo.model.untrusted import read_index
from megatron_octo.rundir import write_json

if TYPE_CHECKING:
    import torch

FORMAT_FILE = "metadata.json"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
WEIGHT_FILES = "*.distcp"
COMMON_STATE = "common_state/shard_0_1"
"""megatron looks its unsharded state up under this key; weights alone have none, so it is empty."""

NUMBERS = "/data/0"
"""Name in `torch.save`'s archive of what a single tensor holds."""
ZIP_HEADER = struct.Struct("<26x2H")
"""A zip entry's own header; it ends with the lengths of the name and of the extra field that follow it."""


class Reader:
    """The tensors of a `torch_dist` folder, by key; each read touches only the pieces it needs."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            BadInput: `folder` is not a `torch_dist` checkpoint, or its index refers to what it must not.
        """
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder = folder
        metadata = read_index(folder)
        self._storage = metadata.storage_data
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def keys(self) -> list[str]:
        """Keys of all tensors; optimizer state included."""
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Number format of a tensor."""
        dtype: torch.dtype = self._entry(key).properties.dtype
        return dtype

    def read(self, key: str, index: int | None = None) -> torch.Tensor:
        """A whole tensor, or the `index`-th slice along its first axis.

        Raises:
            BadInput: no such tensor, or its pieces do not cover it.
        """
        import torch

        entry = self._entry(key)
        start, stop = (0, entry.size[0]) if index is None else (index, index + 1)
        shape = torch.Size((stop - start, *entry.size[1:]))
        out, covered = None, 0
        for chunk in entry.chunks:
            low, high = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if low >= high:
                continue
            piece = self._piece(key, chunk)[low - chunk.offsets[0] : high - chunk.offsets[0]]
            if piece.shape == shape:  # nothing to put together, nothing to copy
                return piece if index is None else piece[0]
            out = torch.empty(shape, dtype=entry.properties.dtype) if out is None else out
            place = (
                slice(low - start, high - start),
                *(slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)),
            )
            out[place] = piece
            covered += piece.numel()
        if out is None or covered != out.numel():
            raise BadInput(
                f"{self.folder}: the pieces of {key} hold {covered:,} of its {shape.numel():,} numbers",
                fix="take another save: this one is not whole",
            )
        return out if index is None else out[0]

    def _entry(self, key: str) -> Any:
        if key not in self._tensors:
            raise BadInput(f"{self.folder} has no tensor {key}", fix="give a save of this kind of model")
        return self._tensors[key]

    def _piece(self, key: str, chunk: Any) -> torch.Tensor:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        info = self._storage[MetadataIndex(key, chunk.offsets)]
        path = self.folder / info.relative_path
        if path.parent != self.folder or not path.is_file():
            raise BadInput(
                f"{self.folder} has no file {info.relative_path}, which {key} is in", fix="take another save"
            )
        try:
            return _mapped(path, info.offset, info.length)
        except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise BadInput(f"{path} holds no numbers for {key}: {error}", fix="take another save") from None


def _mapped(path: Path, offset: int, length: int) -> torch.Tensor:
    """The tensor that `torch.save` wrote into a part of a file; its numbers stay on disk until they are used.

    torch can map whole files only. Its format is a zip archive with nothing compressed: a pickle that describes the
    tensor, and the numbers.
    """
    import torch
    from torch.distributed.checkpoint.utils import _create_file_view

    page = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        with torch.serialization.skip_data():
            shell = torch.load(_create_file_view(file, offset, length), map_location="cpu", weights_only=True)
        content = mmap.mmap(file.fileno(), page + length, offset=offset - page, access=mmap.ACCESS_COPY)
    archive = zipfile.ZipFile(cast(BinaryIO, content))
    entry = next(each for each in archive.infolist() if each.filename.endswith(NUMBERS))
    if not shell.is_contiguous() or entry.file_size != shell.nbytes:
        raise ValueError("it is a view of other numbers")
    if not shell.numel():
        return shell
    start = entry.header_offset + ZIP_HEADER.size + sum(ZIP_HEADER.unpack_from(content, entry.header_offset))
    numbers = torch.frombuffer(content, dtype=shell.dtype, count=shell.numel(), offset=start)
    return numbers.view(shell.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a tensor to write, made when its turn comes."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where it begins in the whole tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    """The numbers, of `shape`."""

    def num_bytes(self) -> int:
        """Length of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write a `torch_dist` checkpoint that megatron loads at any parallel layout; holds one piece at a time.

    The pieces of a key tile it. `folder` exists.
    """
    import warnings

    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import (
        BytesIOWriteData,
        SavePlan,
        TensorWriteData,
        WriteItem,
        WriteItemType,
    )

    items = [
        WriteItem(
            index=MetadataIndex(COMMON_STATE), type=WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(nbytes=0)
        )
    ]
    by_place: dict[MetadataIndex, Piece] = {}
    for piece in pieces:
        where = MetadataIndex(piece.key, piece.offset)
        by_place[where] = piece
        chunk = ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=torch.Size(piece.shape))
        data = TensorWriteData(
            chunk=chunk, properties=TensorProperties(dtype=piece.dtype), size=torch.Size(piece.global_shape)
        )
        items.append(WriteItem(index=where, type=WriteItemType.SHARD, tensor_data=data))

    class Planner(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            self.plan = SavePlan(items=items)
            return self.plan

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            if write_item.type is WriteItemType.BYTE_IO:
                empty = io.BytesIO()
                torch.save([{}], empty)
                return empty
            piece = by_place[write_item.index]
            show(piece.num_bytes())
            return piece.make().contiguous()

    total = sum(piece.num_bytes() for piece in by_place.values())
    with warnings.catch_warnings(), console.byte_meter("write weights", total) as show:
        warnings.filterwarnings("ignore", message=".*single process.*")  # no_dist is what is meant
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(folder, thread_count=1),
            planner=Planner(flatten_state_dict=False),
            no_dist=True,
        )
    write_json(folder / FORMAT_FILE, FORMAT)
