"""AdamW through megatron's optimizer; its numbers come from the settings, never from a save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_octo.config.train import MidTrainConfig


def build_optimizer(wrapped: Sequence[Any], config: MidTrainConfig) -> Any:
    """The optimizer of this rank's chunks. All ranks call it."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ours, parallel = config.optimizer, config.parallel
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate.peak,
            weight_decay=ours.weight_decay,
            adam_beta1=ours.beta1,
            adam_beta2=ours.beta2,
            adam_eps=ours.eps,
            clip_grad=ours.clip_norm,
            bf16=config.precision.dtype == "bf16",
            params_dtype=wrapped[0].config.params_dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        list(wrapped),
    )
    set_numbers(optimizer, config)
    return optimizer


def set_numbers(optimizer: Any, config: MidTrainConfig) -> None:
    """Give every parameter group this stage's betas and eps; loading a save brings the parent's."""
    ours = config.optimizer
    for group in optimizer.param_groups:
        group["betas"] = (ours.beta1, ours.beta2)
        group["eps"] = ours.eps


def follow_weights(optimizer: Any, weights: Mapping[str, Any], config: MidTrainConfig) -> None:
    """Give the fp32 copies the values of the `weights` just loaded: of FP8 weights as they were read, not rounded."""
    optimizer.reload_model_params(state_dict=weights if config.precision.fp8_weights else None)


def round_weights(optimizer: Any) -> None:
    """Make FP8 weights of the fp32 copies, as an update does: a save has them in bf16, which rounds their scales."""
    for each in optimizer.chained_optimizers:
        each._copy_main_params_to_model_params()
        each.start_param_sync_for_bucket_group_subset()


def gradient_norm(optimizer: Any) -> float:
    """Make the gradients ready for `update` and return their global norm. All ranks call it."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: Any, grad_norm: float, config: MidTrainConfig) -> None:
    """Clip the gradients, whose norm is given, and change the weights: the rest of megatron's `step`."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    if config.optimizer.clip_norm > 0:
        clip_grad_by_total_norm_fp32(optimizer.get_parameters(), config.optimizer.clip_norm, grad_norm)
    optimizer.step_with_ready_grads()


def set_rates(optimizer: Any, *, rate: float, weight_decay: float) -> None:
    """Give every parameter group the learning rate and the weight decay of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = weight_decay * group["wd_mult"]  # 0 for norms
