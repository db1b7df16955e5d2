"""The layer specification of a decoder: Transformer Engine's on a GPU, megatron's local layers with our norm and
attention elsewhere. Chosen once, here; both give the same checkpoint keys.

Shapes: s sequence, b batch, n heads of this rank, g query groups of this rank, d head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_octo.platform import Platform


def layer_spec(config: TransformerConfig, platform: Platform, *, vp_stage: int | None) -> TransformerBlockSubmodules:
    """What this pipeline rank's (and chunk's) decoder layers are made of."""
    if platform.layer_family == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    return _local_spec(config, vp_stage)


def _local_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    norm = _rms_norm_class()
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    # megatron's torch norm refuses sequence parallelism
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = _causal_attention_class()
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = norm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _rms_norm_class() -> type:
    import torch

    class RMSNorm(torch.nn.RMSNorm):
        """torch's RMSNorm; its weight's gradient is summed over tensor-parallel ranks under sequence parallelism."""

        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
            super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
            self.weight.sequence_parallel = config.sequence_parallel

    return RMSNorm


def _causal_attention_class() -> type:
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
            out = attend(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3))
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
