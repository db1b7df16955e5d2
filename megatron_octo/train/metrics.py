"""Where a stage's numbers go: metrics.jsonl, which is the truth; TensorBoard beside it; a line for people.

Rank 0 alone makes one of these.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.console import duration, logger
from megatron_octo.model.flops import peak_flops, train_flops_per_token
from megatron_octo.rundir import write_atomic

if TYPE_CHECKING:
    from megatron_octo.config.train import MidTrainConfig, TrainPlan
    from megatron_octo.train.step import StepResult

FILE = "metrics.jsonl"
GIB = 2**30


class Metrics:
    """Records every step; prints one in `log_every_steps`."""

    def __init__(self, run: Path, config: MidTrainConfig, plan: TrainPlan, *, step: int, time_s: float) -> None:
        """Open the sinks of a run that stands after `step`, having trained for `time_s`; later lines are dropped."""
        _drop_after(run / FILE, step)
        self._config, self._plan = config, plan
        self._file = (run / FILE).open("a")
        self._board = _tensorboard(run / "tensorboard", purge_step=step + 1)
        self._peak = _gpu_peak()
        self._offset = time_s
        self._started = self._last = self._last_logged = time.monotonic()
        self._logged_step = step

    @property
    def time_s(self) -> float:
        """Seconds of training so far, earlier attempts included."""
        return self._offset + self._last - self._started

    def record(self, step: int, result: StepResult, rate: float, more: Mapping[str, float]) -> None:
        """Write the numbers of the step that just ended, and `more`, by name."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * self._plan.batch_tokens,
            "train/loss": result.loss,
            "optim/lr": rate,
            "optim/grad_norm": result.grad_norm,
            **more,
            "throughput/tokens_per_second": self._plan.batch_tokens / seconds,
            "time_s": self.time_s,
        }
        if self._peak:
            row["throughput/mfu"] = self._mfu(row["throughput/tokens_per_second"])
        self._file.write(json.dumps(row) + "\n")
        if self._board:
            for name, value in row.items():
                if "/" in name:
                    self._board.add_scalar(name, value, step)
        if step % self._config.log_every_steps == 0 or step == self._plan.num_steps:
            self._log(step, row, now)

    def flush(self) -> None:
        """Put everything recorded on disk; a save calls it first, so that no save is ahead of the metrics."""
        self._file.flush()
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """Flush and close the sinks."""
        self.flush()
        self._file.close()
        if self._board:
            self._board.close()

    def _log(self, step: int, row: dict[str, Any], now: float) -> None:
        steps, seconds = step - self._logged_step, now - self._last_logged
        self._logged_step, self._last_logged = step, now
        per_second = steps * self._plan.batch_tokens / seconds
        total = self._plan.num_steps
        fields = [
            f"step {step:,}/{total:,}",
            f"{100 * step / total:.1f}%",
            f"loss {row['train/loss']:.4f}",
            f"lr {row['optim/lr']:.2e}",
            f"grad {row['optim/grad_norm']:.2f}",
            f"{per_second / self._plan.world_size / 1000:.1f}k tok/s/{'gpu' if _has_gpu() else 'rank'}",
        ]
        if self._peak:
            fields.append(f"mfu {100 * self._mfu(per_second):.1f}%")
        fields += [f"{peak_memory_gib():.1f} GiB", f"eta {duration((total - step) * seconds / steps)}"]
        logger(__name__).info("%s", "  ".join(fields))
        self.flush()

    def _mfu(self, tokens_per_second: float) -> float:
        assert self._peak
        flops = train_flops_per_token(self._config.model, self._config.data.seq_length)
        return tokens_per_second * flops / self._plan.world_size / self._peak


def peak_memory_gib() -> float:
    """This rank's peak so far: of the GPU's memory, or of the process without one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / GIB)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _gpu_peak() -> float | None:
    import torch

    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _drop_after(path: Path, step: int) -> None:
    """Leave only whole lines of steps up to `step`: an interrupted attempt went further than its last save."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        write_atomic(path, "".join(kept))


def _tensorboard(folder: Path, *, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger(__name__).info("no TensorBoard files: the tensorboard package is not installed")
        return None
    return SummaryWriter(str(folder), purge_step=purge_step, max_queue=1000, flush_secs=600)
