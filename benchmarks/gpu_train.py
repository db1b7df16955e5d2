"""What training costs on one GPU: `octo train` on the recipes' models at 8,192 tokens, in BF16 and in each FP8 recipe.

    python benchmarks/gpu_train.py --dry-run                      # the plan, on any machine
    python benchmarks/gpu_train.py --models 1b --precision bf16,delayed
    python benchmarks/gpu_train.py --json                         # all cells, those measured before taken as they are
    python benchmarks/gpu_train.py --nondeterministic             # without compute.deterministic: its price

Each cell is a process of its own, ended after its steps: weights are random, the data is synthetic and prepared once,
nothing is saved. A cell is appended to results.jsonl in --folder when it ends, so a run that was cut off goes on with
the next one. A model that does not fit on the GPU has fewer layers, the same in every precision, and says so in its
name: its numbers are not the whole model's.

    tok/s/gpu, mfu  medians over the steps after the warm-up, as metrics.jsonl has them
    peak GiB        largest allocation of torch, of the warm-up too; planned: plan/memory.py, without its reserve
    loss gap        mean loss of the last quarter of the steps against BF16's on the same batches
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from train_step import on_words, prepare_words

from megatron_octo import console, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.schedule import ConstantRate
from megatron_octo.config.train import (
    BudgetConfig,
    ComputeConfig,
    FromScratch,
    MidTrainConfig,
    PrecisionConfig,
    SaveConfig,
)
from megatron_octo.plan.memory import GPU_GIB, rank_memory
from megatron_octo.platform import Platform, fp8, resolve
from megatron_octo.platform.process import die_with, octo_command

RECIPES = Path(__file__).parent.parent / "recipes"
MODELS = {"1b": "llama32_1b", "3b": "llama32_3b", "8b": "llama31_8b"}
SEQUENCES = {"1b": 8, "3b": 4, "8b": 2, "tiny": 8}  # of a step, a second or two each; the paper's 512 on 64 GPUs are 8
PRECISIONS = ("bf16", *fp8.NEEDS)
SEQ_LENGTH = 8192
LEARNING_RATE = 3e-5  # reached at the last step: where random weights begin with it, large models' losses jump
WARMUP_STEPS = 5
ENOUGH_STEPS = 1000  # the budget: its last step, which saves, is never reached
FITS = 0.95  # of the GPU's memory
POLL_S = 0.2
TINY = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=128,
    vocab_size=256,
    tied_embeddings=True,
    rope_theta=10_000.0,
    max_positions=64,
)
PACKAGES = ("megatron_octo", "torch", "megatron-core", "transformer-engine")
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the cells run, or would."""

    platform: Platform
    gpu: str
    gib: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    model: str
    """Its name, with the number of layers if not all are there."""
    precision: str
    config: MidTrainConfig
    missing: str | None
    """What the machine lacks for it."""

    def __str__(self) -> str:
        return f"{self.model} {self.precision}"

    @property
    def memory(self) -> tuple[float, float]:
        """GiB of the plan, and without its reserve."""
        memory = rank_memory(self.config, self.config.resolve(1))
        reserve = sum(part.bytes for part in memory.parts if part.name == "reserve")
        return memory.total_gib, memory.total_gib - reserve / 2**30


def main() -> int:
    """Measure what is not measured yet, and print all that was asked for."""
    asked = parse()
    folder = asked.folder.resolve()
    os.environ["OCTO_RUNS"] = str(folder / "runs")
    os.environ.pop("NVTE_ALLOW_NONDETERMINISTIC_ALGO", None)  # it would decide instead of --nondeterministic
    machine = look("cpu" if asked.tiny else asked.gpu)
    if machine.platform.device == "cpu" and not (asked.tiny or asked.dry_run):
        print(
            "gpu_train.py needs a GPU, and torch finds none here\n"
            "  fix: run it on a machine with one; --dry-run prints the plan, --tiny runs small models on the CPU",
            file=sys.stderr,
        )
        return 2
    cells = [each for model in asked.models for each in cells_of(model, folder, machine, asked)]
    if asked.dry_run:
        show_plan(cells, machine)
        return 0
    prepare_data(folder, cells)
    results = [result_of(cell, folder, machine, asked) for cell in cells]
    if asked.json:
        console.emit_json(summary(results, machine))
    else:
        show(results, machine)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""

    def several(names: Sequence[str]) -> Callable[[str], list[str]]:
        def parsed(text: str) -> list[str]:
            unknown = [name for name in text.split(",") if name not in names]
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(names)}")
            return text.split(",")

        return parsed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=several([*MODELS]), default=[*MODELS], help="1b,3b,8b")
    parser.add_argument("--precision", type=several(PRECISIONS), default=[*PRECISIONS], help=",".join(PRECISIONS))
    parser.add_argument("--steps", type=int, default=20, help=f"measured steps, after {WARMUP_STEPS} of warm-up")
    parser.add_argument(
        "--nondeterministic", action="store_true", help="attention sums its gradients in no fixed order"
    )
    parser.add_argument("--cell-timeout-s", type=float, default=400.0, help="seconds until a cell is given up")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu-train"), help="data, logs and results.jsonl")
    parser.add_argument("--again", action="store_true", help="measure anew what results.jsonl has")
    parser.add_argument("--gpu", choices=[*GPU_GIB], default="h100", help="with --dry-run: plan for this GPU")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; run and write nothing")
    parser.add_argument("--tiny", action="store_true", help="try this script: a small model, FP8 by emulation")
    parser.add_argument("--json", action="store_true", help="machine output")
    asked = parser.parse_args()
    if asked.tiny:
        asked.models = ["tiny"]
    return asked


# ---- the plan


def look(planned_gpu: str) -> Machine:
    """This machine, seen by a process that ends: none but the cells shall hold memory of the GPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        platform, gpu, gib = pool.apply(see)
    return Machine(platform=platform, gpu=gpu or planned_gpu, gib=gib or GPU_GIB.get(planned_gpu, math.inf))


def see() -> tuple[Platform, str, float]:
    """The platform, and the GPU's name and memory; none without one."""
    import torch

    platform = resolve()
    if platform.device == "cpu":
        return platform, "", 0.0
    return platform, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30


def cells_of(model: str, folder: Path, machine: Machine, asked: argparse.Namespace) -> list[Cell]:
    """A model's cells, with as many layers as fit on the GPU in every precision."""
    tiny = asked.tiny
    whole = (
        small_batches("tiny", TINY, folder, asked, seq_length=TINY.max_positions, micro_batch=2)
        if tiny
        else stage(model, folder, asked)
    )
    formats = {
        name: PrecisionConfig(fp8="off" if name == "bf16" else name, fp8_emulation=tiny and name != "bf16")  # type: ignore[arg-type]
        for name in PRECISIONS
    }
    layers = next(
        (
            layers
            for layers in range(whole.model.num_layers, 0, -1)
            if all(fits(with_layers(whole, layers), each, machine.gib) for each in formats.values())
        ),
        1,
    )
    name = model if layers == whole.model.num_layers else f"{model}-{layers}-layers"
    return [
        Cell(
            model=name,
            precision=precision,
            config=replace(
                with_layers(whole, layers), name=f"{name}-{precision}".replace("_", "-"), precision=formats[precision]
            ),
            missing=None if tiny or precision == "bf16" else fp8.lacking(precision, machine.platform),
        )
        for precision in asked.precision
    ]


def stage(model: str, folder: Path, asked: argparse.Namespace) -> MidTrainConfig:
    """The recipe's model and micro-batch, alone on a GPU."""
    paper = load_recipe(f"{RECIPES / MODELS[model]}.py:stable_200b", MidTrainConfig)
    return small_batches(
        model, paper.model, folder, asked, seq_length=SEQ_LENGTH, micro_batch=paper.budget.micro_batch_sequences
    )


def small_batches(
    name: str, model: ModelConfig, folder: Path, asked: argparse.Namespace, *, seq_length: int, micro_batch: int
) -> MidTrainConfig:
    """A stage of this model from random weights, on our data, that saves at its end alone."""
    step_tokens = SEQUENCES[name] * seq_length
    return MidTrainConfig(
        name="x",
        model=model,
        start=FromScratch(),
        data=on_words(folder / f"data-{model.vocab_size}", seq_length),
        budget=BudgetConfig(
            train_tokens=ENOUGH_STEPS * step_tokens,
            batch_sequences=SEQUENCES[name],
            micro_batch_sequences=micro_batch,
        ),
        learning_rate=ConstantRate(peak=LEARNING_RATE, warmup_tokens=(WARMUP_STEPS + asked.steps) * step_tokens),
        compute=ComputeConfig(deterministic=not asked.nondeterministic),
        save=SaveConfig(every_steps=ENOUGH_STEPS),
        log_every_steps=1,
    )


def with_layers(config: MidTrainConfig, layers: int) -> MidTrainConfig:
    """The stage, its model cut to so many layers."""
    return replace(config, model=replace(config.model, num_layers=layers))


def fits(config: MidTrainConfig, precision: PrecisionConfig, gib: float) -> bool:
    """Whether the plan of it does."""
    config = replace(config, precision=precision)
    return rank_memory(config, config.resolve(1)).total_gib <= FITS * gib


def show_plan(cells: Sequence[Cell], machine: Machine) -> None:
    """What would run."""
    rows = []
    for cell in cells:
        total, _ = cell.memory
        rows.append((str(cell), f"{total:.1f}", "yes" if total <= machine.gib else "no", cell.missing or ""))
    console.table(f"{machine.gpu}, {machine.gib:.0f} GiB", ("cell", "planned GiB", "fits", "lacks here"), rows)
    console.emit(f"each by: {' '.join(command('CELL', Path('FOLDER')))}")


# ---- the runs


def prepare_data(folder: Path, cells: Sequence[Cell]) -> None:
    """The words that the cells read, unless they are there."""
    for size in {cell.config.model.vocab_size for cell in cells}:
        data = folder / f"data-{size}"
        if not rundir.is_done(data / "words"):
            prepare_words(data, vocab_size=size, documents=4000 if size > TINY.vocab_size else 500)


def command(name: str, folder: Path) -> list[str]:
    """The process of a cell, its settings' file last."""
    return octo_command("train", str(folder / "settings" / f"{name}.json"))


def result_of(cell: Cell, folder: Path, machine: Machine, asked: argparse.Namespace) -> Result:
    """A cell's numbers: those in results.jsonl, else measured now and added to it."""
    path = folder / "results.jsonl"
    key = {
        "model": cell.model,
        "precision": cell.precision,
        "deterministic": cell.config.compute.deterministic,
        "steps": asked.steps,
        "gpu": machine.gpu,
    }
    before = recorded(path, key)
    if before and not asked.again:
        return before
    total, planned = cell.memory
    row = {**key, "planned_gib": round(planned, 1), "planned_gib_with_reserve": round(total, 1)}
    row |= {"status": f"needs {cell.missing}"} if cell.missing else measure(cell, folder, asked)
    row["loss_gap"] = loss_gap(row, row if cell.precision == "bf16" else recorded(path, {**key, "precision": "bf16"}))
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    console.logger(__name__).info("%s: %s", cell, row["status"])
    return row


def recorded(path: Path, key: Result) -> Result:
    """The last row of results.jsonl with this key; an empty one for none."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((row for row in reversed(rows) if key.items() <= row.items()), {})


def measure(cell: Cell, folder: Path, asked: argparse.Namespace) -> Result:
    """Run a cell until it has taken its steps, and then end it."""
    run, log, wanted = rundir.run_folder(cell.config.name), folder / "log" / f"{cell.config.name}.txt", asked.steps
    shutil.rmtree(run, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = command(cell.config.name, folder)
    rundir.write_json(Path(argv[-1]), to_dict(cell.config))
    parent, end = os.getpid(), time.monotonic() + asked.cell_timeout_s
    with log.open("w") as output:
        child = subprocess.Popen(
            argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: die_with(parent, signal.SIGKILL),  # noqa: PLW1509 - a system call only
        )
        try:
            while child.poll() is None and len(rows(run)) < WARMUP_STEPS + wanted and time.monotonic() < end:
                time.sleep(POLL_S)
        finally:
            child.kill()  # not asked to end: it would save
            code = child.wait()
    taken = rows(run)[WARMUP_STEPS : WARMUP_STEPS + wanted]
    shutil.rmtree(run, ignore_errors=True)
    if len(taken) < wanted:
        return {"status": failure(log.read_text(errors="replace"), code, asked.cell_timeout_s)}
    return numbers(taken)


def rows(run: Path) -> list[dict[str, float]]:
    """The steps in a run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def failure(log: str, code: int, timeout_s: float) -> str:
    """What ended a cell early, by its log."""
    if re.search(r"OutOfMemoryError|out of memory", log):
        return "out of memory"
    if code == -signal.SIGKILL:
        return f"not done in {timeout_s:.0f} s"
    said = [line.strip() for line in log.splitlines() if line.strip()]
    return f"failed: {said[-1] if said else f'exit code {code}'}"


def numbers(taken: Sequence[dict[str, float]]) -> Result:
    """Of the measured steps."""
    mfu = [row["throughput/mfu"] for row in taken if "throughput/mfu" in row]
    return {
        "status": "measured",
        "tokens_per_second_per_gpu": round(statistics.median(row["throughput/tokens_per_second"] for row in taken)),
        "mfu": round(statistics.median(mfu), 4) if mfu else None,
        "peak_gib": round(taken[-1]["memory/peak_gib"], 2),
        "losses": [row["train/loss"] for row in taken],
    }


def loss_gap(result: Result, bf16: Result) -> float | None:
    """How far the mean loss of the last quarter is above BF16's, as a share of it."""
    if "losses" not in result or "losses" not in bf16:
        return None
    quarter = math.ceil(len(result["losses"]) / 4)
    ours, theirs = (statistics.mean(each["losses"][-quarter:]) for each in (result, bf16))
    return round(ours / theirs - 1, 5)


def summary(results: Sequence[Result], machine: Machine) -> Result:
    """All of it."""
    versions = {name: version(name) for name in PACKAGES}
    return {"gpu": machine.gpu, "platform": machine.platform.describe(), "versions": versions, "cells": results}


def version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def show(results: Sequence[Result], machine: Machine) -> None:
    """The table."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    table = [
        (
            each["model"],
            each["precision"],
            shown(each.get("tokens_per_second_per_gpu"), ",d"),
            shown(each.get("mfu"), ".1%"),
            shown(each.get("peak_gib"), ".1f"),
            f"{each['planned_gib']:.1f}",
            shown(each["loss_gap"], "+.2%"),
            "" if each["status"] == "measured" else each["status"],
        )
        for each in results
    ]
    columns = ("model", "precision", "tok/s/gpu", "mfu", "peak GiB", "planned", "loss gap", "")
    console.table(f"{machine.gpu}; {machine.platform.describe()}", columns, table)


if __name__ == "__main__":
    console.configure()
    sys.exit(main())
