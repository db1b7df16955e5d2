"""The layer specification of a decoder: Transformer Engine's on a GPU, megatron's local layers with our norm, SwiGLU
and attention elsewhere. Chosen once, here; both give the same checkpoint keys.

Shapes: s sequence, b batch, n heads of this rank, g query groups of this rank, d head width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_octo.model.fp8_emulation import linear_classes
from megatron_octo.model.functions import rms_norm, swiglu

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_octo.config.train import PrecisionConfig
    from megatron_octo.platform import Platform


def layer_spec(
    config: TransformerConfig, platform: Platform, precision: PrecisionConfig, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """What this pipeline rank's (and chunk's) decoder layers are made of."""
    if platform.layer_family == "local":
        return _local_spec(config, platform, precision, vp_stage)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    for layer in block.layer_specs:
        layer.submodules.mlp = _mlp(layer.submodules.mlp.keywords["submodules"])
    return block


def _local_spec(
    config: TransformerConfig, platform: Platform, precision: PrecisionConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    from megatron.core import tensor_parallel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    norm = _rms_norm_class(platform)
    plain, qk_norm = (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear), config.qk_layernorm
    rounding = linear_classes(precision.fp8) if precision.fp8_emulation else plain
    in_bf16, in_fp8 = (_local_layer(norm, linear, qk_norm=qk_norm) for linear in (plain, rounding))
    first, last = precision.bf16_first_layers, config.num_layers - precision.bf16_last_layers
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    numbers = range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[in_fp8 if first <= number < last else in_bf16 for number in numbers], layer_norm=norm
    )


def _local_layer(norm: type, linear: tuple[type, type], *, qk_norm: bool) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.mlp import MLPSubmodules

    column, row = linear
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm  # megatron's torch norm refuses sequence parallelism
    attention.core_attention = causal_attention_class()
    attention.linear_qkv, attention.linear_proj = column, row
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    parts.mlp = _mlp(MLPSubmodules(linear_fc1=column, linear_fc2=row))
    return layer


def _rms_norm_class(platform: Platform) -> type:
    """A norm whose weight's gradient is summed over tensor-parallel ranks under sequence parallelism."""
    import torch

    base: Any = torch.nn.RMSNorm
    if platform.apex:
        import apex.normalization

        base = apex.normalization.FusedRMSNorm

    class RMSNorm(base):
        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
            super().__init__(hidden_size, eps=eps)
            self.weight.data = self.weight.data.to(config.params_dtype)
            self.weight.sequence_parallel = config.sequence_parallel

        def forward(self, x: torch.Tensor) -> Any:
            return rms_norm(x, self.weight, self.eps) if x.device.type == "cpu" else super().forward(x)

    return RMSNorm


def _mlp(submodules: Any) -> Callable[..., Any]:
    """megatron's gated MLP of these linear layers."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from megatron.core.transformer.mlp import MLP

    class GatedMLP(MLP):
        """megatron's without biases. Under selective recomputation the input of the second product, wide and cheap to
        make, is made again for its gradient."""

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            gate_up, _ = self.linear_fc1(hidden_states)
            activate = functools.partial(bias_swiglu_impl, bias=None) if self.config.bias_activation_fusion else swiglu
            hidden = activate(gate_up)
            again = self.config.recompute_granularity == "selective"
            with made_again(hidden, lambda: activate(gate_up.detach())) if again else contextlib.nullcontext():
                return self.linear_fc2(hidden)

    return functools.partial(GatedMLP.as_mlp_submodule, submodules=submodules)


@contextlib.contextmanager
def made_again(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> Iterator[None]:
    """In the block, `tensor` is not kept for the backward pass: `make` gives it then."""
    import torch

    place, size = tensor.data_ptr(), tensor.numel()

    def pack(kept: torch.Tensor) -> Any:
        return kept.shape if kept.data_ptr() == place and kept.numel() == size else kept

    def unpack(kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else make().view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def causal_attention_class() -> type:
    """The attention of the local layers."""
    import torch
    from megatron.core.transformer.module import MegatronModule

    class CausalAttention(MegatronModule):
        """torch's scaled_dot_product_attention: causal, grouped queries, no mask tensor.

        Over whole sequences; or, with PackedSeqParams, over one document after the other.
        """

        def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config=config)

        def forward(
            self, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
        ) -> Any:
            """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]; packed, all are without b."""
            if packed_seq_params is not None:
                return _by_document(query, key, value, packed_seq_params.cu_seqlens_q)
            s, b, n, d = query.shape
            value = value.permute(1, 2, 0, 3).contiguous()  # far strides would cost more than this copy
            out = attend(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value)
            return out.permute(2, 0, 1, 3).reshape(s, b, n * d)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )

    def _by_document(query: Any, key: Any, value: Any, borders: Any) -> Any:
        lengths = borders.diff().tolist()
        parts = [each.transpose(0, 1)[None].split(lengths, dim=2) for each in (query, key, value)]
        out = torch.cat([attend(*document) for document in zip(*parts, strict=True)], dim=2)
        return out[0].transpose(0, 1).flatten(1)

    return CausalAttention
