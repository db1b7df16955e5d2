"""Megatron's `torch_dist` folders, read and written one tensor at a time: no ranks, no process group, no GPU.

Nothing of it is unpickled that could run code: the index by `model/untrusted.py`, tensors with `weights_only`, and
byte blobs (`_extra_state`, the common state) are never opened.
"""

from __future__ import annotations

import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from megatron_octo import console
from megatron_octo.convert.output import MAX_FILE_BYTES, into_files, write_files
from megatron_octo.convert.page_cache import read_ahead, written_behind
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.model.untrusted import INDEX, read_index
from megatron_octo.rundir import write_atomic, write_json

if TYPE_CHECKING:
    import torch

FORMAT_FILE = "metadata.json"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
WEIGHT_FILES = "*.distcp"
KEPT = (WEIGHT_FILES, INDEX)
"""Of a checkpoint whose writing was cut off."""
COMMON_STATE = "common_state/shard_0_1"
"""megatron looks its unsharded state up under this key; weights alone have none, so it is empty."""

NUMBERS = "/data/0"
"""Name in `torch.save`'s archive of what a single tensor holds."""
ZIP_HEADER = struct.Struct("<26x2H")
"""A zip entry's own header; it ends with the lengths of the name and of the extra field that follow it."""


class Reader:
    """The tensors of a `torch_dist` folder, by key; each read touches only the pieces it needs."""

    def __init__(self, folder: Path, index: Any = None, on_read: Callable[[Path], object] | None = None) -> None:
        """Read the index, unless a writer gives its own, as it is so far.

        `on_read` hears of a file before each read from it, and sees to it that the disk reads it ahead.

        Raises:
            BadInput: `folder` is not a `torch_dist` checkpoint, or its index refers to what it must not.
        """
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder, self._on_read = folder, on_read
        metadata = index or read_index(folder)
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
            if self._on_read is None:
                read_ahead(piece)
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

        info = self._storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise BadInput(
                f"{self.folder / INDEX} names no file for the piece of {key} at {tuple(chunk.offsets)}",
                fix="take another save: this one is not whole",
            )
        path = self.folder / info.relative_path
        if path.parent != self.folder or not path.is_file():
            raise BadInput(
                f"{self.folder} has no file {info.relative_path}, which {key} is in", fix="take another save"
            )
        if self._on_read:
            self._on_read(path)
        try:
            piece = _mapped(path, info.offset, info.length)
            if (piece.shape, piece.dtype) != (chunk.sizes, self.dtype(key)):
                raise ValueError(f"they are {tuple(piece.shape)} in {piece.dtype}")
            return piece
        except (
            OSError,
            OverflowError,
            pickle.UnpicklingError,
            EOFError,
            RuntimeError,
            ValueError,
            zipfile.BadZipFile,
        ) as error:
            # torch advises to load it without any guard
            why = "its record is torn" if isinstance(error, pickle.UnpicklingError) else error
            raise BadInput(f"{path} holds no numbers for {key}: {why}", fix="take another save") from None


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
    entry = next((each for each in archive.infolist() if each.filename.endswith(NUMBERS)), None)
    if not isinstance(shell, torch.Tensor) or entry is None or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is no tensor")
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


type Check = Callable[[Reader, Sequence[Piece]], None]
"""Hears of the pieces of a file once it is written, with a reader of that file."""


def unchecked(reader: Reader, pieces: Sequence[Piece]) -> None:
    """Take a file as it is."""


def write(
    folder: Path,
    pieces: Sequence[Piece],
    *,
    check: Check = unchecked,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> str:
    """Write a `torch_dist` checkpoint that megatron loads at any parallel layout; holds a few pieces at a time.

    The pieces of a key tile it. `folder` exists. A file that is in it already is whole, and stays; the index, written
    with each file, knows it. Returns one SHA-256 over the files.

    Raises:
        VerificationError: the index cannot be read back; or what `check` raises.
    """
    import torch
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
    from torch.utils.serialization import config as serialization

    index = Metadata(_descriptions(pieces), storage_data={}, version=CURRENT_DCP_VERSION)
    groups = into_files(pieces, Piece.num_bytes, max_file_bytes)
    files = {f"__0_{number}.distcp": group for number, group in enumerate(groups)}
    places: dict[str, dict[MetadataIndex, _StorageInfo]] = {}

    def write_file(path: Path) -> None:
        found = places[path.name] = {}

        def add(where: MetadataIndex, content: object) -> None:
            start = file.tell()
            torch.save(content, file)
            found[where] = _StorageInfo(path.name, start, file.tell() - start)

        with written_behind(path) as file:
            if path.name == next(iter(files)):
                add(MetadataIndex(COMMON_STATE), [{}])
            for piece in files[path.name]:
                add(MetadataIndex(piece.key, piece.offset), _alone(piece.make()))
                wrote(piece.num_bytes())

    def check_file(path: Path) -> None:
        index.storage_data.update(places.pop(path.name, {}))
        check(Reader(path.parent, index), files[path.name])
        write_atomic(folder / INDEX, pickle.dumps(index))

    index.state_dict_metadata[COMMON_STATE] = BytesStorageMetadata()
    if (folder / INDEX).exists():
        index.storage_data.update(read_index(folder).storage_data)
    with (
        serialization.patch("save.compute_crc32", False),  # a third of the time; torch.load looks at none
        console.byte_meter("write weights", sum(piece.num_bytes() for piece in pieces)) as wrote,
    ):
        wrote(sum(piece.num_bytes() for name, group in files.items() if (folder / name).exists() for piece in group))
        digest = write_files(folder, list(files), write_file, check_file)
    if read_index(folder) != index:
        raise VerificationError(f"{folder / INDEX} is not what was written", fix="look after the disk; convert again")
    write_json(folder / FORMAT_FILE, FORMAT)
    return digest


def _descriptions(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Shape, number format and pieces of each tensor, by key."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    found: dict[str, Any] = {}
    for piece in pieces:
        whole = TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size(piece.global_shape), [])
        chunk = ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=torch.Size(piece.shape))
        found.setdefault(piece.key, whole).chunks.append(chunk)
    return found


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as all of its storage, without a copy where it is contiguous: torch.save writes whole storages."""
    import torch

    flat = tensor.contiguous().flatten().view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(tensor.dtype).view(tensor.shape)
