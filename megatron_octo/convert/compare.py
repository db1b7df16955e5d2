"""Bit for bit: do the weights of a Hugging Face folder and of a save return from their way there and back?

Reads what is on the disk, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.convert import page_cache
from megatron_octo.convert.hf_folder import Weights
from megatron_octo.errors import VerificationError
from megatron_octo.model import mapping

if TYPE_CHECKING:
    import torch

    from megatron_octo.convert.save import Save
    from megatron_octo.convert.torch_dist import Reader

SHOWN = 5


def compare_export(source: Save, exported: Weights) -> None:
    """Join exported tensors again and compare with the save's, in the export's number format.

    Raises:
        VerificationError: some differ.
    """
    wrong = []
    for weight in mapping.weights(source.model):
        if weight.parts[0][0] in exported.shapes:
            parts, origin = [exported.read(name) for name, _ in weight.parts], source.read(weight.key, weight.layer)
            page_cache.populate(*parts, origin)
            back = weight.rows(parts)  # as `join`, which would copy them
            rows = origin.to(back[0].dtype).split([len(piece) for piece in back])
            if not all(map(_same_bits, back, rows)):
                wrong.append(weight.parts[0][0])
            page_cache.release(*parts, origin)
    _raise_if_any(wrong, exported.folder, source.folder)


def compare_import(reader: Reader, weights: Sequence[mapping.Weight], hf: Weights) -> None:
    """Split the tensors of a new base again and compare with those that they were made of.

    Raises:
        VerificationError: some differ.
    """
    wrong = []
    for weight in weights:
        written, parts = reader.read(weight.key, weight.layer), [hf.read(name) for name, _ in weight.parts]
        page_cache.populate(written, *parts)
        if not all(map(_same_bits, weight.split(written), parts)):
            wrong.append(weight.parts[0][0])
        page_cache.release(written, *parts)
    _raise_if_any(wrong, reader.folder, hf.folder)


def _raise_if_any(wrong: Sequence[str], result: Path, origin: Path) -> None:
    if wrong:
        raise VerificationError(
            f"{result}: {len(wrong)} tensors differ from those of {origin}: {', '.join(wrong[:SHOWN])}",
            fix="do not use this result; convert again",
        )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    both = [each.contiguous().flatten().view(torch.uint8) for each in (a, b)]
    if all(each.numel() % 8 == each.storage_offset() % 8 == 0 for each in both):
        both = [each.view(torch.int64) for each in both]  # seven times as fast
    return torch.equal(*both)
