"""Names a rank that holds all others back: it computes longer than the data ranks that do the same work."""

from __future__ import annotations

import time
from statistics import median_low
from typing import TYPE_CHECKING, Any

from megatron_octo.console import logger

if TYPE_CHECKING:
    from megatron_octo.config.train import WatchConfig


class Straggler:
    """Times this rank's part of each step: from its start to where the gradients of all data ranks are awaited.

    Ranks that share a copy of the model wait for each other before that, so one slow rank names its whole copy.
    """

    def __init__(self, chunk: Any, config: WatchConfig, *, device: str) -> None:
        """`chunk`: the rank's first, wrapped already; megatron's schedules take the hook from its config."""
        self._config, self._device = config, device
        self._seconds, self._steps, self._started = 0.0, 0, 0.0
        finish = chunk.config.finalize_model_grads_func

        def timed(*args: Any, **options: Any) -> Any:
            self._stop()
            return finish(*args, **options)

        chunk.config.finalize_model_grads_func = timed

    def start(self) -> None:
        """A step begins."""
        self._started = time.monotonic()

    def report(self, step: int) -> None:
        """After every `straggler_every_steps`-th step: compare, and have a slow rank say so. All ranks call it."""
        if step % self._config.straggler_every_steps or not self._steps:
            return
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state as groups

        mine = torch.tensor([self._seconds / self._steps], device=self._device)
        self._seconds, self._steps = 0.0, 0
        peers = [torch.empty_like(mine) for _ in range(groups.get_data_parallel_world_size())]
        dist.all_gather(peers, mine, group=groups.get_data_parallel_group())
        usual = median_low([each.item() for each in peers])
        if mine.item() > self._config.straggler_ratio * usual:
            logger(__name__).warning(
                "step %s: a slow rank: it computes %.3g s a step, the median of those that do the same work %.3g s",
                f"{step:,}",
                mine.item(),
                usual,
            )

    def _stop(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.current_stream().synchronize()  # of kernels only: gradients on their way are another stream's
        now = time.monotonic()
        self._seconds, self._started = self._seconds + now - self._started, now
        self._steps += 1
