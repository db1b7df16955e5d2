"""Settings -> megatron-core's GPTModel. Nothing else in the package knows megatron's model class or its options."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_octo.config.train import ComputeConfig
from megatron_octo.errors import BadInput
from megatron_octo.model.layers import layer_spec
from megatron_octo.platform import bf16_matmul, fp8

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from megatron_octo.config.model import ModelConfig
    from megatron_octo.config.train import MidTrainConfig, ParallelConfig, PrecisionConfig
    from megatron_octo.platform import Platform

PLAIN = ComputeConfig()
AMAX_HISTORY = 1024  # forward passes that delayed scaling looks back on: Transformer Engine's default, not megatron's 1


def build_model(
    config: ModelConfig,
    *,
    platform: Platform,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    compute: ComputeConfig = PLAIN,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    num_ids: int | None = None,
) -> GPTModel:
    """Build this rank's part of the model, with random weights, on the platform's device.

    All ranks of a copy of the model call it. It needs an activated platform and initialised model-parallel
    groups (`platform/process_group.py`), and draws from torch's generator.

    Args:
        config: the model.
        platform: chooses layers and device.
        parallel: how the model is cut.
        precision: number formats.
        compute: what is computed twice, recorded, or summed in one order.
        pre_process: whether the embedding is in this part.
        post_process: whether the output layer is in this part; without it the result is hidden states [s, b, h].
        vp_stage: which model chunk of this rank, under the interleaved schedule.
        num_ids: the tokenizer's; rows of the output layer beyond them are padding, which no loss sees. None for all.
    """
    import torch
    from megatron.core.models.gpt import GPTModel

    precision = usable_precision(precision, platform)
    if precision.fp8_emulation:
        platform = replace(platform, layer_family="local")  # its linear layers are the ones that can be told to round
    if compute.deterministic and platform.layer_family == "transformer_engine":
        platform.fix_order()
    if precision.dtype == "bf16" and platform.device == "cpu":
        bf16_matmul.install()
    transformer = transformer_config(config, platform=platform, parallel=parallel, precision=precision, compute=compute)
    model = GPTModel(
        transformer,
        layer_spec(transformer, platform, precision, vp_stage=vp_stage),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        # GPTModel's scaling is Llama 3's: frequency factors 1 and 4, original length 8192
        rope_scaling=config.rope_factor is not None,
        rope_scaling_factor=config.rope_factor or 1.0,
        vp_stage=vp_stage,
    )
    if post_process and num_ids is not None and num_ids < config.vocab_size:
        _mask_padding(model.output_layer, num_ids)
    return model.cuda(torch.cuda.current_device()) if platform.device == "cuda" else model


def _mask_padding(output_layer: Any, num_ids: int) -> None:
    """Give the logits of rows beyond `num_ids` the lowest number there is: their probability and gradient are 0.

    Not -inf, whose difference from itself is no number: a tensor-parallel rank may hold nothing but padding.
    """
    import torch
    from megatron.core import parallel_state as groups

    start = num_ids - groups.get_tensor_model_parallel_rank() * output_layer.output_size_per_partition

    def mask(layer: Any, inputs: Any, output: tuple[Any, Any]) -> None:
        logits, _ = output  # [s, b, v of this rank]
        logits[..., max(start, 0) :] = torch.finfo(logits.dtype).min

    if start < output_layer.output_size_per_partition:
        output_layer.register_forward_hook(mask)


def check_platform(config: MidTrainConfig, platform: Platform) -> None:
    """Refuse settings that this machine cannot do; changes nothing.

    Raises:
        BadInput: context parallelism or CUDA graphs without Transformer Engine, or an FP8 recipe without its chip and
            versions.
    """
    parallel, precision = config.parallel, config.precision
    engine = platform.layer_family == "transformer_engine"
    if parallel.context > 1 and not engine:
        raise BadInput(
            f"parallel.context {parallel.context} needs Transformer Engine, which is not here",
            fix="set parallel.context to 1, or run where `octo doctor` finds Transformer Engine",
        )
    if config.compute.cuda_graphs and not engine:
        raise BadInput(
            "compute.cuda_graphs needs a GPU and Transformer Engine, which are not here",
            fix="turn compute.cuda_graphs off, or run where `octo doctor` finds both",
        )
    missing = fp8_missing(precision, platform)
    if missing and not precision.fp8_fallback:
        here = ", ".join(fp8.running(platform))
        raise BadInput(
            f"precision.fp8 {precision.fp8} needs {missing}",
            fix=(f"choose a recipe that runs here ({here})" if here else "set precision.fp8 to off")
            + ", or let it train in bf16 where FP8 is missing (precision.fp8_fallback)",
        )


def fp8_missing(precision: PrecisionConfig, platform: Platform) -> str | None:
    """What this machine lacks for the FP8 recipe asked for; None where nothing is missing, or nothing asked for."""
    if precision.fp8 == "off" or precision.fp8_emulation:
        return None
    return fp8.lacking(precision.fp8, platform)


def usable_precision(precision: PrecisionConfig, platform: Platform) -> PrecisionConfig:
    """The precision that this machine trains in: bf16 where FP8 was asked for and is missing."""
    if precision.fp8 == "off" or fp8_missing(precision, platform):
        return replace(precision, fp8="off", fp8_weights=False, fp8_emulation=False)
    return precision


def transformer_config(
    config: ModelConfig,
    *,
    platform: Platform,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    compute: ComputeConfig = PLAIN,
) -> TransformerConfig:
    """megatron's settings object for this model on this platform."""
    import torch
    from megatron.core.transformer import TransformerConfig

    engine = platform.layer_family == "transformer_engine"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision.dtype]
    interleaved = parallel.virtual_pipeline is not None
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=config.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == "bf16",
        calculate_per_token_loss=True,  # DDP reads it when it is built
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,  # batched sends deadlock at two interleaved ranks
        deallocate_pipeline_outputs=True,
        # on the CPU: the same weights at any tensor-parallel size
        use_cpu_initialization=platform.device == "cpu",
        # apex's kernel; the output layer is megatron's own even among Transformer Engine's layers, and needs it
        gradient_accumulation_fusion=platform.apex and not parallel.fsdp,
        masked_softmax_fusion=False,
        persist_layer_norm=engine,
        apply_rope_fusion=engine or platform.device == "cpu",  # there `platform/rotary.py`
        bias_activation_fusion=engine,
        bias_dropout_fusion=engine,
        **_fp8_options(precision),
        **_compute_options(compute),
    )


def _fp8_options(precision: PrecisionConfig) -> dict[str, Any]:
    """megatron's names for FP8 by Transformer Engine; none where it is off or emulated."""
    if precision.fp8 == "off" or precision.fp8_emulation:
        return {}
    return {
        # of each product's operands: one scale a tensor leaves gradients short of range in E4M3, scales a block do not
        "fp8": "hybrid" if precision.fp8 in ("delayed", "tensorwise") else "e4m3",
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.fp8_weights,
        "fp8_amax_history_len": AMAX_HISTORY,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": precision.bf16_first_layers + precision.bf16_last_layers > 0,
        "num_layers_at_start_in_bf16": precision.bf16_first_layers,
        "num_layers_at_end_in_bf16": precision.bf16_last_layers,
    }


def _compute_options(compute: ComputeConfig) -> dict[str, Any]:
    """megatron's names for recomputation and CUDA graphs."""
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": []},  # `model/layers.py` does it
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    options = recompute[compute.recompute]
    return options | ({"cuda_graph_impl": "local"} if compute.cuda_graphs else {})
