"""Tensors compared as bits."""

from __future__ import annotations

import pytest
import torch

from megatron_octo.convert.compare import _same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 8)])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_one_bit_anywhere_makes_tensors_differ(dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> None:
    length = torch.Size(shape).numel()
    a = torch.randn(offset + length).to(dtype)[offset:].view(shape)
    assert _same_bits(a, a.clone())
    for place in range(length * dtype.itemsize):
        b = a.clone()
        b.flatten().view(torch.uint8)[place] ^= 1
        assert not _same_bits(a, b)


def test_bits_are_compared_and_not_numbers() -> None:
    nan = torch.full((4,), float("nan"))
    assert _same_bits(nan, nan.clone())
    assert not _same_bits(torch.zeros(4), -torch.zeros(4))
    assert not _same_bits(torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16))
    assert not _same_bits(torch.zeros(4), torch.zeros(2, 2))
    assert _same_bits(torch.arange(12.0).view(3, 4).T, torch.arange(12.0).view(3, 4).T.contiguous())
