"""FP8's numerics without its chip: the operands of a layer's matrix products are rounded as a recipe rounds them, then
multiplied in fp32.

It says how a recipe behaves, not what Transformer Engine's kernels do. As there: E4M3 forward, E5M2 for the gradients
of the recipes with one scale a tensor; blocks lie along the dimension that a product sums over, so an operand of two
products is rounded for each; a value beyond the largest is that one.
Shapes: t tokens, i inputs, o outputs of a linear layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Block = tuple[int, int]
INPUT, WEIGHT, GRADIENT = range(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How operands are rounded."""

    gradient_format: str = "float8_e4m3fn"
    """Format of the output's gradient; inputs and weights are E4M3."""
    block: Block | None = None
    """Rows x columns of an input or gradient that share a scale; None for the whole tensor."""
    weight_block: Block | None = None
    """The same of a weight."""
    power_of_two: bool = False
    """Whether scales are powers of two, as E8M0 holds them."""
    history: int = 0
    """Passes whose largest values make the scale of the next; 0 to scale by the tensor's own."""
    scaled: bool = True
    """False for bare E4M3, which no recipe is: what the scales are for."""

    def rounded(self, operand: torch.Tensor, kind: int, amax: torch.Tensor | None = None) -> torch.Tensor:
        """`operand` [any, summed over] after its way through FP8, in fp32; `amax` is its largest value as foreseen."""
        import torch

        dtype = getattr(torch, self.gradient_format if kind == GRADIENT else "float8_e4m3fn")
        rows, columns = (self.weight_block if kind == WEIGHT else self.block) or operand.shape
        height, width = operand.shape
        padded = torch.nn.functional.pad(operand.float(), (0, -width % columns, 0, -height % rows))
        blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        if amax is None:
            amax = blocks.abs().amax((1, 3), keepdim=True)
        largest = torch.finfo(dtype).max
        scale = amax / largest if self.scaled else torch.ones_like(amax)
        if self.power_of_two:
            scale = scale.log2().ceil().exp2()
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
        out = (blocks / scale).clamp(-largest, largest).to(dtype).float() * scale
        return out.view_as(padded)[:height, :width]


RECIPES = {
    "delayed": Recipe(gradient_format="float8_e5m2", history=1024),
    "tensorwise": Recipe(gradient_format="float8_e5m2"),
    "blockwise": Recipe(block=(1, 128), weight_block=(128, 128), power_of_two=True),
    "mxfp8": Recipe(block=(1, 32), weight_block=(1, 32), power_of_two=True),
}


@functools.cache
def linear_classes(name: str) -> tuple[type, type]:
    """megatron's column- and row-parallel linear layers, their products rounded by the recipe of that name."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import mappings

    recipe, function = RECIPES[name], _linear_function()

    class Rounding:
        """Before megatron's class: replaces its product; under delayed scaling it keeps the history."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.amaxes = torch.zeros(recipe.history, 3) if recipe.history else None

        def _forward_impl(
            self,
            input: torch.Tensor,
            weight: torch.Tensor,
            *,
            allreduce_dgrad: bool,
            sequence_parallel: bool,
            tp_group: Any,
            **unused: Any,
        ) -> Any:
            if sequence_parallel:
                input = mappings.gather_from_sequence_parallel_region(
                    input, tensor_parallel_output_grad=True, group=tp_group
                )
            elif allreduce_dgrad:
                input = mappings.copy_to_tensor_model_parallel_region(input, group=tp_group)
            return function(input, weight, recipe, self.amaxes)

        def get_extra_state(self) -> torch.Tensor | None:
            return self.amaxes

        def set_extra_state(self, state: torch.Tensor | None) -> None:
            if state is not None and self.amaxes is not None:
                self.amaxes.copy_(state)

    return (
        type("RoundingColumnParallelLinear", (Rounding, tensor_parallel.ColumnParallelLinear), {}),
        type("RoundingRowParallelLinear", (Rounding, tensor_parallel.RowParallelLinear), {}),
    )


@functools.cache
def _linear_function() -> Any:
    import torch

    class RoundedLinear(torch.autograd.Function):
        """x [..., i], weight [o, i] -> [..., o]; `amaxes` [history, 3] under delayed scaling."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, recipe: Recipe, amaxes: Any) -> Any:
            ctx.recipe, ctx.amaxes = recipe, amaxes
            ctx.foreseen = (None, None, None) if amaxes is None else tuple(amaxes.amax(0))
            ctx.save_for_backward(x, weight)
            rounded = recipe.rounded(x.flatten(0, -2), INPUT, ctx.foreseen[INPUT])
            out = rounded @ recipe.rounded(weight, WEIGHT, ctx.foreseen[WEIGHT]).t()
            return out.view(*x.shape[:-1], -1).to(weight.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
            x, weight = ctx.saved_tensors
            recipe, foreseen = ctx.recipe, ctx.foreseen
            flat_x, flat = x.flatten(0, -2), grad.flatten(0, -2)

            def rounded_gradient(operand: Any) -> Any:
                return recipe.rounded(operand, GRADIENT, foreseen[GRADIENT])

            grad_x = rounded_gradient(flat) @ recipe.rounded(weight.t(), WEIGHT, foreseen[WEIGHT]).t()
            grad_weight = rounded_gradient(flat.t()) @ recipe.rounded(flat_x.t(), INPUT, foreseen[INPUT]).t()
            if ctx.amaxes is not None:
                _remember(ctx.amaxes, (flat_x, weight, flat))
            return grad_x.view_as(x).to(x.dtype), grad_weight.to(weight.dtype), None, None

    return RoundedLinear.apply


def _remember(amaxes: Any, operands: tuple[Any, ...]) -> None:
    """Put the pass's largest values first in the history, over all ranks that share its layers. They all call it."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as groups

    now = torch.stack([operand.detach().abs().max().float() for operand in operands])
    dist.all_reduce(now, op=dist.ReduceOp.MAX, group=groups.get_amax_reduction_group(with_context_parallel=True))
    amaxes.copy_(torch.cat([now[None], amaxes[:-1]]))
