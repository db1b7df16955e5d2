"""What two ranks train for `test_watching.py`, in one launch: faults put into steps, validation, marks, a hang.

Both call `main`. It ends as a hung job ends; `trained` in the folder says that all else is there.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo import console, rundir
from megatron_octo.budget.watch import Finding
from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.config.train import (
    FromRun,
    MarksConfig,
    MidTrainConfig,
    ParallelConfig,
    SaveConfig,
    ValidateConfig,
    WatchConfig,
)
from megatron_octo.errors import OctoError
from megatron_octo.train import watchdog
from tests.cpu.matrix import LAYOUTS, alone, interrupt, train
from tests.prepared import BATCH, SEQ_LENGTH, VOCAB, hold_out, stage, write_documents, write_source

STEPS = 16
HELD_OUT = 6  # sequences: no whole micro-batches of two ranks
FAULTY = 13
SKIP = WatchConfig(window_steps=8, on_non_finite="skip", on_grad_norm="skip", on_loss_spike="skip")
BACK = replace(SKIP, on_non_finite="roll_back", on_grad_norm="roll_back", on_loss_spike="roll_back")
BACK_THREE = replace(BACK, leave_out_steps=3)
STOP = replace(SKIP, on_non_finite="stop")
NAN = math.nan
OFTEN = SaveConfig(every_steps=5, keep_last=4)
VALIDATE = ValidateConfig(every_steps=5, sequences=HELD_OUT)
EXPORT = "hf/step_00000007/model.safetensors"
VALIDATED = ("dp2", "dp2-overlap", "tp2", "pp2-vpp2")
SECRET = "key-that-nobody-may-read"
HANG_TIMEOUT_S = 10.0
GRACE_S = 4.0  # for the stacks of a hung job
STRAGGLER_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that goes wrong with the steps of a run."""

    step: int | None = None
    """The step; None for all."""
    gradients: float = 1.0
    """Multiplies rank 0's gradients."""
    loss: float = 0.0
    """Added to the loss."""
    once: bool = False
    """Gone when the step is computed again."""
    sleep_s: float = 0.0
    """Rank 1 is late by so much."""
    stop: Path | None = None
    """The run that is asked to stop in the step."""


def main(work: str) -> None:
    """Train everything below `work`."""
    import torch.distributed as dist

    folder = Path(work)
    console.configure()
    sys.path.insert(0, str(folder / "modules"))  # where a wandb is
    sys.modules.pop("wandb", None)  # megatron has imported the real one
    os.environ |= {"OCTO_RUNS": str(folder / "runs"), "WANDB_API_KEY": SECRET}
    is_first = os.environ["RANK"] == "0"
    if is_first:
        write_inputs(folder)
        with alone():
            train(replace(stage(folder / "data", "base", steps=1), parallel=ParallelConfig()))
            train(small(folder, "validated-alone", parallel=ParallelConfig(), validate=VALIDATE))
    dist.init_process_group("gloo")
    train(small(folder, "plain", wandb_project="project"))
    for name in VALIDATED:
        train(small(folder, f"validated-{name}", parallel=LAYOUTS[name], validate=VALIDATE))
    draw_twice(folder)
    train_with_faults(folder)
    for name, watch in (("back-three", BACK_THREE), ("skipped", SKIP)):
        if is_first:
            interrupt(name, f"{name}-resumed", after=15)
        dist.barrier()
        with_fault(small(folder, f"{name}-resumed", watch=watch, save=OFTEN), Fault(step=FAULTY, gradients=NAN))

    train_with_marks(folder)
    if is_first:
        (folder / "trained").touch()
    dist.barrier()
    watchdog.GRACE_S = GRACE_S
    hang = WatchConfig(hang_timeout_s=HANG_TIMEOUT_S)
    with_fault(small(folder, "hung", watch=hang), Fault(step=3, sleep_s=1e6))


def draw_twice(folder: Path) -> None:
    """Write what a step that is computed twice draws from each generator. Both ranks call it."""
    import torch
    from megatron.core import tensor_parallel

    from megatron_octo.train.again import RunAgain

    drawn = []

    def step() -> tuple[float, float]:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            shared = torch.rand(1).item()
        drawn.append((torch.rand(1).item(), shared, float(np.random.rand())))
        return 1.0, 1.0

    wrong = Finding(what="the first is wrong", action="stop")
    RunAgain().compute(step, lambda _: wrong if len(drawn) == 1 else None)
    if os.environ["RANK"] == "0":
        rundir.write_json(folder / "drawn.json", drawn)


def train_with_faults(folder: Path) -> None:
    """What the watch does. Both ranks call it."""
    nan, large = Fault(step=FAULTY, gradients=NAN), Fault(step=FAULTY, gradients=1e4)
    with_fault(small(folder, "passing", watch=STOP), replace(nan, once=True))
    with_fault(small(folder, "stopped", watch=STOP), nan)
    with_fault(small(folder, "skipped", watch=SKIP, save=OFTEN), nan)
    with_fault(small(folder, "skipped-pp2-vpp2", watch=SKIP, parallel=LAYOUTS["pp2-vpp2"]), large)
    with_fault(small(folder, "skipped-loss", watch=SKIP), Fault(step=FAULTY, loss=3.0))
    with_fault(small(folder, "too-many", watch=replace(SKIP, most_skips_in_a_row=2)), Fault(loss=NAN))
    with_fault(small(folder, "back-one", watch=replace(BACK, leave_out_steps=1)), nan)
    with_fault(small(folder, "back-three", watch=BACK_THREE, save=OFTEN), nan)
    stop = rundir.run_folder("back-stopped")
    with_fault(small(folder, "back-stopped", watch=BACK_THREE, save=OFTEN), replace(nan, stop=stop))
    with_fault(small(folder, "back-three-dp2-overlap", watch=BACK_THREE, parallel=LAYOUTS["dp2-overlap"]), large)
    with_fault(small(folder, "back-nowhere", watch=BACK), Fault(step=4, gradients=NAN))
    slow = small(folder, "slow", steps=2 * STRAGGLER_STEPS, watch=WatchConfig(straggler_every_steps=STRAGGLER_STEPS))
    with_fault(slow, Fault(sleep_s=0.5))


def train_with_marks(folder: Path) -> None:
    """A mark whose evaluation fails, then the resumed run without an evaluation. Both ranks call it."""
    import torch.distributed as dist

    failing = EvaluateConfig(task="sums", problems=folder / "no such file", models=())
    marks = MarksConfig(at_tokens=(7 * BATCH * SEQ_LENGTH,), evaluate=failing)
    train(small(folder, "marked", marks=marks, save=SaveConfig(every_steps=15, keep_last=1)))
    if dist.get_rank() == 0:
        interrupt("marked", "marked-resumed", after=15)
        (folder / "export").write_text(rundir.sha256(rundir.run_folder("marked-resumed") / EXPORT))
    dist.barrier()
    train(small(folder, "marked-resumed", marks=replace(marks, evaluate=None)))


def small(folder: Path, name: str, *, steps: int = STEPS, **changes: Any) -> MidTrainConfig:
    """16 steps of two data ranks from the weights and moments that all share, saved after 10 and 16."""
    config = stage(folder / "data", name, steps=steps, save_every=10)
    return replace(config, **{"start": FromRun(run="base"), "parallel": LAYOUTS["dp2"], **changes})


def with_fault(config: MidTrainConfig, fault: Fault) -> None:
    """Train with a fault in a step; an OctoError's message goes to `error` in the run's folder."""
    from megatron_octo.train import step

    kept = step.forward_backward
    step.forward_backward = faulty(kept, fault)  # type: ignore[assignment]
    try:
        train(config)
    except OctoError as error:
        if os.environ["RANK"] == "0":
            (rundir.run_folder(config.name) / "error").write_text(str(error))
    finally:
        step.forward_backward = kept


def faulty(compute: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
    """`forward_backward` with the fault in it."""
    seen: set[int] = set()

    def forward_backward(wrapped: Any, loader: Any, consumed: int, *rest: Any, **options: Any) -> tuple[float, Any]:
        import torch

        step = consumed // BATCH + 1
        strikes = fault.step in (None, step) and not (fault.once and step in seen)
        seen.add(step)
        if fault.stop and fault.step == step and os.environ["RANK"] == "0":
            (fault.stop / rundir.STOP).touch()
        if strikes and os.environ["RANK"] == "1":
            time.sleep(fault.sleep_s)
        loss, votes = compute(wrapped, loader, consumed, *rest, **options)
        if strikes and os.environ["RANK"] == "0":
            for buffer in wrapped[0].buffers:
                buffer.grad_data.mul_(torch.tensor(fault.gradients))
        return (loss + fault.loss if strikes else loss), votes

    return forward_backward


def write_inputs(folder: Path) -> None:
    """Two sources that hold out documents, one of its own kind and one noise; a tokenizer that transformers reads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    data = folder / "data"
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(data / "tokenizer")
    for seed, name in enumerate(("a", "b")):
        write_source(data / name, data / "tokenizer", seed=seed)
    write_source(data / "like-a", data / "tokenizer", seed=0, documents=300)  # the first 200 are those of `a`
    rng = np.random.default_rng(3)
    noise = [[int(each) for each in rng.integers(3, VOCAB, 50)] for _ in range(20)]
    write_documents(data / "noise", data / "tokenizer", [noise[:10], noise[10:]], VOCAB)
    hold_out(data / "a", data / "like-a")
    hold_out(data / "b", data / "noise")
