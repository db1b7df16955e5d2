"""An AdamW for megatron's optimizers where neither Transformer Engine nor apex gives a fused one.

Without either, megatron falls back to torch's AdamW, and its DistributedOptimizer then cannot load a
checkpoint in a fresh process: it expects `step` in the parameter group. This class has Transformer
Engine's state layout, so a save is laid out as on a GPU; its steps are those of torch.optim.AdamW(fused=True).
"""

from __future__ import annotations

from typing import Any

from megatron_octo.platform.shards import local_part


def install() -> None:
    """Give megatron's optimizers this Adam unless they have a fused one. A second call changes nothing."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distrib_optimizer.Adam = fused_adam_class()
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def fused_adam_class() -> type:
    """A class with the constructor and the state layout of transformer_engine.pytorch.optimizers.FusedAdam."""
    import torch

    class FusedAdam(torch.optim.Optimizer):
        def __init__(  # noqa: PLR0917 - Transformer Engine's signature
            self,
            params: Any,
            lr: float = 1e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0.0,
            adam_w_mode: bool = True,
            capturable: bool = False,
        ) -> None:
            if not adam_w_mode:
                raise NotImplementedError("only decoupled weight decay")
            super().__init__(
                params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
            )

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                params = [param for param in group["params"] if param.grad is not None]
                if group["params"]:
                    group["step"] = group.get("step", 0) + 1
                if params:
                    self._update(params, group)

        def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
            for param in params:
                if not self.state[param]:
                    self.state[param].update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
            step = torch.tensor(float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                [local_part(param) for param in params],
                [local_part(param.grad) for param in params],
                [local_part(self.state[param]["exp_avg"]) for param in params],
                [local_part(self.state[param]["exp_avg_sq"]) for param in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    return FusedAdam
