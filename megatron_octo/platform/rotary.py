"""Rotary positions for megatron's attention on the CPU, in the place of Transformer Engine's fused ones.

megatron's own make ten copies of queries and keys, and sines anew in each layer, forward and backward.
Shapes: s sequence, b batch, n heads, d head width; t tokens of packed documents.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def install() -> None:
    """Give megatron's `apply_rope_fusion` these functions. A second call changes nothing."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils.fused_apply_rotary_pos_emb = rotate
    rope_utils.fused_apply_rotary_pos_emb_thd = rotate_documents


def rotate(x: torch.Tensor, angles: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x [s, b, n, d] turned by angles [s, 1, 1, d]; in memory the result is [b, n, s, d], as attention reads it."""
    assert not interleaved, "Llama's rotary positions are not interleaved"
    out: torch.Tensor = _rotation().apply(x, angles.cos(), angles.sin())
    return out


def rotate_documents(
    x: torch.Tensor, borders: torch.Tensor, angles: torch.Tensor, interleaved: bool = False, **context: int
) -> torch.Tensor:
    """x [t, n, d] of documents between borders [documents + 1], each turned by angles [longest, 1, 1, d] from 0 on."""
    import torch

    lengths = borders.diff()
    positions = torch.arange(len(x)) - borders[:-1].repeat_interleave(lengths)
    return rotate(x[:, None], angles[positions], interleaved)[:, 0]


@functools.cache
def _rotation() -> Any:
    import torch

    class Rotation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, cos: Any, sin: Any) -> Any:
            ctx.save_for_backward(cos, sin)
            s, b, n, d = x.shape
            return _turn(x, cos, sin, out=x.new_empty(b, n, s, d).permute(2, 0, 1, 3))

        @staticmethod
        def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
            cos, sin = ctx.saved_tensors
            return _turn(grad, cos, -sin, out=grad.new_empty(grad.shape)), None, None

    return Rotation


def _turn(x: Any, cos: Any, sin: Any, *, out: Any) -> Any:
    import torch

    half = x.shape[-1] // 2
    torch.mul(x, cos.to(x.dtype), out=out)
    sin = sin.to(x.dtype)  # no addcmul_ below: it rounds once less than transformers
    out[..., :half].sub_(x[..., half:] * sin[..., :half])
    out[..., half:].add_(x[..., :half] * sin[..., half:])
    return out
