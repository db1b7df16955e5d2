"""Megatron's checkpoint folders without ranks: written, read in pieces, and no code run that they carry."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from megatron_octo.convert import torch_dist
from megatron_octo.convert.torch_dist import Piece, Reader
from megatron_octo.errors import BadInput


def pieces(key: str, tensor: torch.Tensor, sizes: tuple[int, ...]) -> Iterable[Piece]:
    """`tensor` as a grid of pieces of `sizes`."""
    starts = [range(0, whole, part) for whole, part in zip(tensor.shape, sizes, strict=True)]
    for offset in (
        torch.cartesian_prod(*(torch.tensor(list(start)) for start in starts)).reshape(-1, len(sizes)).tolist()
    ):
        place = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
        yield Piece(
            key=key,
            global_shape=tuple(tensor.shape),
            offset=tuple(offset),
            shape=sizes,
            dtype=tensor.dtype,
            make=lambda place=place: tensor[place],
        )


@pytest.fixture
def stacked() -> torch.Tensor:
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path, stacked: torch.Tensor) -> Path:
    """Two tensors: one cut along all axes, in fp32, and one whole, in bf16."""
    whole = pieces("norm", torch.arange(5.0).to(torch.bfloat16), (5,))
    torch_dist.write(tmp_path, [*pieces("layers", stacked, (2, 3, 8)), *whole])
    return tmp_path


def test_tensors_come_back_bit_for_bit_in_their_own_format(folder: Path, stacked: torch.Tensor) -> None:
    reader = Reader(folder)
    assert reader.keys() == ["layers", "norm"]
    assert torch.equal(reader.read("layers"), stacked)
    assert reader.read("norm").dtype == reader.dtype("norm") == torch.bfloat16
    assert reader.shape("layers") == (4, 6, 8)


def test_one_layer_is_read_out_of_pieces_that_hold_several(folder: Path, stacked: torch.Tensor) -> None:
    reader = Reader(folder)
    assert all(torch.equal(reader.read("layers", layer), stacked[layer]) for layer in range(4))


def test_torch_itself_reads_what_was_written(folder: Path, stacked: torch.Tensor) -> None:
    import torch.distributed.checkpoint as dcp

    state = {"layers": torch.empty_like(stacked)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert torch.equal(state["layers"], stacked)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_code_planted_in_the_index_does_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Payload(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(BadInput, match=r"mkdir, which describes no tensor"):
        Reader(folder)
    assert not mark.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert mark.exists(), "the payload is one: plain pickle runs it"


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch.distributed.checkpoint.metadata.os.system"])
def test_the_index_may_name_nothing_but_descriptions(folder: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    (folder / ".metadata").write_bytes(f"c{module}\n{function}\n(S'1'\ntR.".encode())
    with pytest.raises(BadInput, match="describes no tensor"):
        Reader(folder)


def test_code_planted_in_a_tensor_does_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    data = io.BytesIO()
    torch.save(Payload(mark), data)
    index = pickle.loads((folder / ".metadata").read_bytes())
    where = next(each for each in index.storage_data if each.fqn == "norm")
    info = index.storage_data[where]
    info.relative_path, info.offset, info.length = "planted.distcp", 0, len(data.getvalue())
    (folder / "planted.distcp").write_bytes(data.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(BadInput, match="holds no numbers for norm"):
        Reader(folder).read("norm")
    assert not mark.exists()


def test_a_save_with_a_missing_piece_is_refused(folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata["layers"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(BadInput, match="144 of its 192 numbers"):
        Reader(folder).read("layers")


def test_an_index_that_names_no_file_for_a_piece_is_refused(folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    del index.storage_data[next(each for each in index.storage_data if each.fqn == "norm")]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(BadInput, match=r"names no file for the piece of norm at \(0,\)"):
        Reader(folder).read("norm")


@pytest.mark.parametrize("value", [None, 5, "text", (1, 2), torch.Size([1]), torch.Size([-1, 6, 8])], ids=str)
@pytest.mark.parametrize(
    "field", ["size", "properties", "dtype", "chunks", "offsets", "sizes", "relative_path", "offset", "length"]
)
def test_an_index_with_a_field_of_another_kind_is_refused(folder: Path, field: str, value: object) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    entry = index.state_dict_metadata["layers"]
    info = next(info for where, info in index.storage_data.items() if where.fqn == "layers")
    holders = (entry, entry.properties, entry.chunks[0], info)
    setattr(next(each for each in holders if hasattr(each, field)), field, value)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(BadInput):
        Reader(folder).read("layers")


@pytest.mark.parametrize("field", ["sizes", "dtype"])
def test_a_piece_that_is_not_as_the_index_says_is_refused(folder: Path, field: str) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    entry = index.state_dict_metadata["norm"]
    if field == "dtype":
        entry.properties.dtype = torch.float16
    else:
        entry.size = torch.Size([7])
        entry.chunks[0] = type(entry.chunks[0])(offsets=torch.Size([0]), sizes=torch.Size([7]))
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(BadInput, match=r"holds no numbers for norm: they are \(5,\) in torch.bfloat16"):
        Reader(folder).read("norm")


def test_pieces_outside_of_the_folder_are_not_read(folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f"../{folder.name}/{info.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(BadInput, match="has no file"):
        Reader(folder).read("norm")


def test_a_torn_index_is_refused(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100])
    with pytest.raises(BadInput, match="torn"):
        Reader(folder)
