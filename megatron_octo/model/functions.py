"""A layer's elementwise parts with their gradients written out, for the CPU: fewer passes over memory than autograd's.

On a GPU, Transformer Engine, apex or torch's compiler fuse them.
Shapes: h hidden size, f width of the MLP; leading dimensions are any.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's rms_norm over the last dimension: x [..., h], weight [h]."""
    out: torch.Tensor = _rms_norm_function().apply(x, weight, eps)
    return out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [..., 2f], the gate first, -> [..., f]."""
    out: torch.Tensor = _swiglu_function().apply(gate_up)
    return out


@functools.cache
def _rms_norm_function() -> Any:
    import torch

    class RMSNormFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            wide = x.float()  # bf16 squares are summed in fp32
            scale = wide.square().mean(-1, keepdim=True)
            scale = scale.add_(eps).rsqrt_()
            ctx.save_for_backward(x, weight, scale)
            return (wide * scale).to(x.dtype).mul_(weight)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            x, weight, scale = ctx.saved_tensors
            grad, wide = grad.float(), weight.float()
            normed = x.float() * scale
            product = (grad * normed).flatten(0, -2)
            along = torch.mv(product, wide).div_(x.shape[-1]).view_as(scale)  # the part that the norm takes out
            grad_x = (grad * wide).addcmul_(normed, along, value=-1).mul_(scale)
            return grad_x.to(x.dtype), product.sum(0).to(weight.dtype), None

    return RMSNormFunction


@functools.cache
def _swiglu_function() -> Any:
    import torch

    class SwiGLUFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            gated = torch.nn.functional.silu(gate)
            ctx.save_for_backward(gate_up, gated)
            return gated * up

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            gate_up, gated = ctx.saved_tensors
            gate, up = gate_up.chunk(2, dim=-1)
            out = torch.empty_like(gate_up)  # both halves are written where they belong, not joined afterwards
            grad_gate, grad_up = out.chunk(2, dim=-1)
            torch.mul(grad, gated, out=grad_up)
            torch.mul(grad, up, out=grad_gate)
            torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
            return out

    return SwiGLUFunction
