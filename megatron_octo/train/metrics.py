"""Where a stage's numbers go: metrics.jsonl, which is the truth; TensorBoard and W&B beside it; lines for people.

Rank 0 alone makes one of these.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.config.base import to_dict
from megatron_octo.console import duration, logger
from megatron_octo.errors import OctoError
from megatron_octo.model.flops import peak_flops, train_flops_per_token
from megatron_octo.rundir import write_atomic
from megatron_octo.train.checkpoint import FIX

if TYPE_CHECKING:
    from megatron_octo.config.train import MidTrainConfig, TrainPlan
    from megatron_octo.train.step import StepResult

FILE, BOARD = "metrics.jsonl", "tensorboard"
GIB = 2**30


class Metrics:
    """Records every step; prints one in `log_every_steps`."""

    def __init__(self, run: Path, config: MidTrainConfig, plan: TrainPlan, *, step: int, time_s: float) -> None:
        """Open the sinks of a run that stands after `step`, having trained for `time_s`; later lines are dropped."""
        self._run, self._config, self._plan = run, config, plan
        self._wandb = _wandb(run, config)
        self._flops = train_flops_per_token(config.model, config.data.seq_length)
        self._peak = _gpu_peak()
        self._offset, self._started = time_s, time.monotonic()
        self._since_log: list[float] = []
        self._open(step)
        logger(__name__).info("%s", self._mfu_formula())

    @property
    def time_s(self) -> float:
        """Seconds of training so far, earlier attempts included."""
        return self._offset + time.monotonic() - self._started

    def record(
        self, step: int, result: StepResult, rate: float, held_out: Mapping[str, float], more: Mapping[str, float]
    ) -> None:
        """Write the numbers of the step that just ended, of the validation after it if there was one, and `more`."""
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * self._plan.batch_tokens,
            "train/loss": result.loss,
            "optim/lr": rate,
            "optim/grad_norm": result.grad_norm,
            **more,
            **{f"valid/{name}/loss": loss for name, loss in held_out.items()},
            "memory/peak_gib": peak_memory_gib(),
            "time_s": self.time_s,
        }
        if result.skipped:
            row["watch/skipped"] = 1
        if result.seconds:
            self._since_log.append(result.seconds)
            row["throughput/tokens_per_second"] = self._plan.batch_tokens / result.seconds
            if self._peak:
                row["throughput/mfu"] = self._mfu(row["throughput/tokens_per_second"], self._peak)
        row = {name: value for name, value in row.items() if math.isfinite(value)}  # JSON has no other numbers
        with _writing(self._run / FILE):
            self._file.write(json.dumps(row) + "\n")
        shown = {name: value for name, value in row.items() if "/" in name}
        if self._board:
            with _writing(self._run / BOARD):
                for name, value in shown.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({"tokens": row["tokens"], **shown}, step=step)
        self._say(step, result, rate, held_out)

    def go_back(self, step: int) -> None:
        """Drop what was recorded after `step`: the run goes on from there."""
        self.close()
        self._open(step)

    def flush(self) -> None:
        """Put everything recorded on disk; a save calls it first, so that no save is ahead of the metrics.

        Raises:
            OctoError: the disk is full, or fails.
        """
        with _writing(self._run / FILE):
            self._file.flush()
        if self._board:
            with _writing(self._run / BOARD):
                self._board.flush()

    def close(self) -> None:
        """Flush and close the sinks on disk."""
        self.flush()
        self._file.close()
        if self._board:
            self._board.close()

    def finish(self) -> None:
        """Close all sinks: the run is done."""
        self.close()
        if self._wandb:
            self._wandb.finish()

    def _open(self, step: int) -> None:
        with _writing(self._run / FILE):
            _drop_after(self._run / FILE, step)
            self._file = (self._run / FILE).open("a")
        with _writing(self._run / BOARD):
            self._board = _tensorboard(self._run / BOARD, purge_step=step + 1)

    def _say(self, step: int, result: StepResult, rate: float, held_out: Mapping[str, float]) -> None:
        log = logger(__name__)
        if result.note:
            log.warning("step %s: %s", f"{step:,}", result.note)
        if step % self._config.log_every_steps == 0 or step == self._plan.num_steps:
            log.info("%s", self._line(step, result, rate))
            self._since_log.clear()
            self.flush()
        if held_out:
            losses = "  ".join(f"{name} {loss:.4f}" for name, loss in held_out.items())
            log.info("step %s  held-out loss  %s", f"{step:,}", losses)

    def _line(self, step: int, result: StepResult, rate: float) -> str:
        total = self._plan.num_steps
        fields = [f"step {step:,}/{total:,}", f"{100 * step / total:.1f}%"]
        if result.is_left_out:
            fields.append("left out")
        else:
            fields += [f"loss {result.loss:.4f}", f"lr {rate:.2e}", f"grad {result.grad_norm:.2f}"]
        if self._since_log:
            seconds = sum(self._since_log) / len(self._since_log)
            per_second = self._plan.batch_tokens / seconds
            unit = "gpu" if _has_gpu() else "rank"
            fields.append(f"{per_second / self._plan.world_size / 1000:.1f}k tok/s/{unit}")
            if self._peak:
                fields.append(f"mfu {100 * self._mfu(per_second, self._peak):.1f}%")
        fields.append(f"{peak_memory_gib():.1f} GiB")
        if self._since_log:
            fields.append(f"eta {duration((total - step) * seconds)}")
        return "  ".join(fields)

    def _mfu(self, tokens_per_second: float, peak: float) -> float:
        return tokens_per_second * self._flops / self._plan.world_size / peak

    def _mfu_formula(self) -> str:
        per_token = f"{self._flops:.4g} FLOP a token: 6 x (weights of matrices + attention, the causal half of it)"
        if self._peak is None:
            return f"mfu: not known, as this device's peak is not; {per_token}"
        return f"mfu = tokens/s/gpu x FLOP a token / {self._peak:.4g} FLOP/s, the GPU's dense bf16 peak; {per_token}"


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


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the disk says against writing `path`, said with its name."""
    try:
        yield
    except OSError as error:
        raise OctoError(f"{path} was not written: {error}", fix=FIX) from error


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


def _wandb(run: Path, config: MidTrainConfig) -> Any:
    """A run of Weights & Biases that goes on where one of this name stopped; None if it is not wanted or not reached.

    Its package takes the key from WANDB_API_KEY itself.
    """
    if config.wandb_project is None:
        return None
    import wandb

    try:
        return wandb.init(
            project=config.wandb_project,
            id=config.name,
            name=config.name,
            resume="allow",
            dir=str(run),
            config=to_dict(config),
        )
    except Exception as error:  # whatever it is, metrics.jsonl has the numbers; its text may hold what is secret
        logger(__name__).warning("no numbers go to W&B: %s; its own log in %s says why", type(error).__name__, run)
        return None
