"""A safetensors file written one tensor at a time: the library's own writer wants all of them in memory.

The bytes are those of `safetensors.torch.save_file`: the header's length (8 bytes, little endian), the header (JSON,
filled up with spaces to a multiple of 8 bytes), then the numbers, in the order of the tensors' names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.convert.page_cache import populate, written_behind
from megatron_octo.errors import BadInput

if TYPE_CHECKING:
    import torch

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ALIGNED_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """A tensor to write, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Its length in a file of `dtype`."""
        size = dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def write(path: Path, tensors: Sequence[Named], dtype: torch.dtype, *, wrote: Callable[[int], None]) -> None:
    """Write the tensors in `dtype`, made in the order given; `wrote` hears of bytes as they are written.

    Raises:
        BadInput: a number is too large for `dtype`.
    """
    header, places = _header(tensors, dtype)
    with written_behind(path) as file:
        file.write(header)
        for each, made in zip(tensors, _one_ahead(each.make() for each in tensors), strict=True):
            populate(made)
            file.seek(len(header) + places[each.name])
            file.write(_bytes(_as(made, dtype, each.name)))
            wrote(each.num_bytes(dtype))


def _one_ahead[T](items: Iterator[T]) -> Iterator[T]:
    """Yield each item when the next one is made: the disk reads that meanwhile."""
    before = next(items)
    for item in items:
        yield before
        before = item
    yield before


def _header(tensors: Sequence[Named], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """(the header, where behind it each tensor begins)."""
    code, start = CODES[str(dtype).removeprefix("torch.")], 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places = {}
    for each in sorted(tensors, key=lambda each: each.name):
        places[each.name], end = start, start + each.num_bytes(dtype)
        entries[each.name] = {"dtype": code, "shape": each.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED_BYTES)
    return len(text).to_bytes(8, "little") + text, places


def _as(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in another number format; BadInput where that makes a number infinite."""
    result = tensor.to(dtype)
    if dtype != tensor.dtype and not result.isfinite().equal(tensor.isfinite()):
        raise BadInput(f"{name} has numbers too large for {dtype}", fix="give another --dtype")
    return result


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
