"""What two ranks do for `test_train.py`, in one launch: many small stages, one after another.

Both call `main`. Rank 0 first trains alone, without a group; then both train together, layout after layout; then
rank 0 alone again. The metrics are in the run folders.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_octo import console, lineage, rundir
from megatron_octo.config.data import SourceConfig
from megatron_octo.config.schedule import ConstantRate, CosineRate, LinearRate, WSDRate
from megatron_octo.config.train import (
    FromImport,
    FromRun,
    FromScratch,
    MidTrainConfig,
    ParallelConfig,
    PrecisionConfig,
)
from tests.conftest import snapshot
from tests.prepared import stage, write_data, write_source, write_tokenizer, write_uniform_source

LAYOUTS = {
    "dp2": ParallelConfig(),
    "dp2-overlap": ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True),
    "dp2-plain": ParallelConfig(distributed_optimizer=False),
    "fsdp2": ParallelConfig(fsdp=True, distributed_optimizer=False),
    "tp2": ParallelConfig(tensor=2),
    "tp2-sp": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2-vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
# A save of the layout before the arrow is resumed by the one after it.
CHANGES = {"tp2-sp": "pp2", "pp2": "dp2", "pp2-vpp2": "tp2", "dp2": "pp2-vpp2"}
BF16_LAYOUTS = ("dp2", "tp2-sp", "pp2")
BF16_STEPS = 8
PEAK = 3e-3


def main(work: str) -> None:
    """Train everything below `work`."""
    folder = Path(work)
    console.configure()
    os.environ["OCTO_RUNS"] = str(folder / "runs")
    rank = int(os.environ["RANK"])
    if rank == 0:
        write_data(folder / "data")
        tokenizer = write_tokenizer(folder / "data" / "tokenizer")
        write_uniform_source(folder / "data" / "uniform", tokenizer)
        write_source(folder / "data" / "c", tokenizer, seed=5)
        with alone():
            train_alone(folder)
    train_together(folder)
    if rank == 0:
        with alone():
            interrupt("dp2", "dp2-then-alone", after=10)
            train(replace(child(folder, "dp2-then-alone"), parallel=ParallelConfig()))


def train_alone(folder: Path) -> None:
    """The stages of one rank: the reference, resume, branches, starts."""
    data = folder / "data"
    train(stage(data, "base", steps=1))
    train(laid_out(stage(data, "base-fsdp", steps=1), ParallelConfig(distributed_optimizer=False)))
    train(child(folder, "reference"))

    # an interrupted attempt that went beyond its last save, and left a torn one
    interrupt("reference", "resumed", after=10)
    run = rundir.run_folder("resumed")
    (run / "checkpoints" / ".step_00000015.1.tmp").mkdir()
    rundir.step_folder(run, 16).mkdir()
    train(child(folder, "resumed"))
    train(child(folder, "resumed"))  # done: changes nothing

    ten = replace(stage(data, "ten", steps=10, save_every=5), start=FromRun(run="base"))
    train(ten)
    interrupt("ten", "ten-resumed", after=5)
    train(replace(ten, name="ten-resumed"))

    # branches of the reference's last save
    stable = replace(child(folder, "decay"), start=FromRun(run="reference"))
    decay = CosineRate(peak=PEAK, floor=PEAK / 10)
    train(replace(stable, learning_rate=decay, save=replace(stable.save, every_steps=5, keep_last=2)))

    # other weights from the last save on
    interrupt("reference", "reweighed", after=10)
    train(reweighed(folder, "reweighed"), reweigh=True)

    branches(folder)

    # every sequence is the same, so a branch at the same rate is the parent gone on
    uniform = uniform_stage(data, "uniform", steps=10)
    train(uniform)
    train(uniform_stage(data, "uniform-parent", steps=5))
    for name, moments in (("uniform-child", True), ("uniform-fresh", False)):
        start = FromRun(run="uniform-parent", optimizer=moments)
        train(replace(uniform_stage(data, name, steps=5), start=start))

    # an import is weights alone
    shutil.copytree(rundir.step_folder(rundir.run_folder("base"), 1), folder / "import")
    lineage.write(folder / "import", lineage.Lineage(name="Llama-3.2-1B", kind="base", weights_sha256=""))
    (folder / "import" / "LICENSE.txt").write_text("terms")
    train(replace(short(stage(data, "imported", steps=2)), start=FromImport(path=folder / "import")))
    train(replace(short(stage(data, "of-imported", steps=2)), start=FromRun(run="imported")))
    train(bf16(folder, "bf16"))
    train(bf16(folder, "bf16-fresh", moments=False))
    write_groups(rundir.step_folder(run, 20), folder / "groups.json")


def branches(folder: Path) -> None:
    """Two branches of the reference's save after 10 steps, in both orders; a resume of one; one of weights alone."""
    import torch

    parent, states = rundir.run_folder("reference"), {}
    before = snapshot(parent)
    for name in ("short-first", "long-second", "long-first", "short-second", "fresh"):
        train(branch(folder, name))
        states[name] = torch.get_rng_state().tolist()
    interrupt("long-first", "long-resumed", after=5)
    train(branch(folder, "long-resumed"))
    write_groups(rundir.step_folder(rundir.run_folder("long-first"), 5), folder / "groups-long.json")
    rundir.write_json(folder / "branches.json", {"states": states, "untouched": snapshot(parent) == before})


def branch(folder: Path, name: str) -> MidTrainConfig:
    """A decay of 10 steps; a long one reads on after its parent, and its weight decay falls too."""
    config = replace(stage(folder / "data", name, steps=10, save_every=5), seed=99)
    start = FromRun(run="reference", tokens=10 * config.batch_tokens, optimizer=name != "fresh")
    config = replace(config, start=start, learning_rate=CosineRate(peak=PEAK, floor=PEAK / 10))
    if not name.startswith("long"):
        return config
    return replace(
        config,
        start=replace(start, skip_consumed=True),
        learning_rate=WSDRate(peak=PEAK, floor=0.0, decay_tokens=8 * config.batch_tokens, shape="minus_sqrt"),
        optimizer=replace(config.optimizer, weight_decay_over_tokens=LinearRate(peak=0.1, floor=0.0)),
    )


def write_groups(save: Path, path: Path) -> None:
    """Write the optimizer's parameter groups in a save as JSON."""
    from megatron.core import dist_checkpointing

    groups = dist_checkpointing.load_common_state_dict(save)["optimizer"]["optimizer"]["param_groups"]
    rundir.write_json(path, [{key: value for key, value in group.items() if key != "params"} for group in groups])


def train_together(folder: Path) -> None:
    """Both ranks: the layouts, then the changes of layout. Both ranks call it."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name, layout in LAYOUTS.items():
        train(laid_out(child(folder, name), layout))
    for before, after in CHANGES.items():
        name = f"{before}-then-{after}"
        if dist.get_rank() == 0:
            interrupt(before, name, after=10)
        dist.barrier()
        train(replace(child(folder, name), parallel=LAYOUTS[after]))
    for name in ("dp2", "fsdp2", "tp2-sp"):
        if dist.get_rank() == 0:
            interrupt(name, f"{name}-resumed", after=10)
        dist.barrier()
        train(laid_out(child(folder, f"{name}-resumed"), LAYOUTS[name]))
    for layout in BF16_LAYOUTS:
        train(replace(bf16(folder, f"bf16-{layout}"), parallel=LAYOUTS[layout]))
    train(replace(bf16(folder, "bf16-fsdp2", moments=False), parallel=LAYOUTS["fsdp2"]))
    dist.destroy_process_group()


def laid_out(config: MidTrainConfig, layout: ParallelConfig) -> MidTrainConfig:
    """The stage on `layout`; without the distributed optimizer, from moments that were saved without it too."""
    config = replace(config, parallel=layout)
    if layout.distributed_optimizer or not isinstance(config.start, FromRun):
        return config
    return replace(config, start=replace(config.start, run=f"{config.start.run}-fsdp"))


def train(config: MidTrainConfig, *, reweigh: bool = False) -> None:
    """`train`, imported late: the first call decides what this process is."""
    from megatron_octo.train.run import train as run

    run(config, reweigh=reweigh)


def child(folder: Path, name: str) -> MidTrainConfig:
    """20 steps from the weights and moments that all share, saved after 10."""
    return replace(stage(folder / "data", name, steps=20, save_every=10), start=FromRun(run="base"))


def reweighed(folder: Path, name: str) -> MidTrainConfig:
    """`child`, with a third of the weight on source a, and a third source."""
    config = child(folder, name)
    a, b = config.data.sources
    c = replace(a, name="c", path=folder / "data" / "c", weight=0.2)
    return replace(config, data=replace(config.data, sources=(replace(a, weight=0.3), replace(b, weight=0.5), c)))


def bf16(folder: Path, name: str, *, moments: bool = True) -> MidTrainConfig:
    """Some steps in bf16 from weights that were trained in fp32."""
    small = replace(stage(folder / "data", name, steps=BF16_STEPS), start=FromRun(run="base", optimizer=moments))
    return replace(small, precision=PrecisionConfig(dtype="bf16"))


def uniform_stage(data: Path, name: str, *, steps: int) -> MidTrainConfig:
    """A stage on the data set of equal sequences."""
    config = stage(data, name, steps=steps, save_every=5)
    sources = (SourceConfig(name="uniform", path=data / "uniform", weight=1.0, max_epochs=1e9),)
    return replace(config, start=FromScratch(), data=replace(config.data, sources=sources))


def short(config: MidTrainConfig) -> MidTrainConfig:
    """The same with a constant rate of nearly nothing: its losses are those of the weights it started from."""
    return replace(config, learning_rate=ConstantRate(peak=1e-12))


def interrupt(source: str, name: str, *, after: int) -> None:
    """Copy a run as it would be had it been killed at its end, its save after step `after` being the last."""
    old, new = rundir.run_folder(source), rundir.run_folder(name)
    shutil.copytree(old, new)
    (new / rundir.DONE).unlink()
    for save in (new / "checkpoints").glob("step_*"):
        if int(save.name[5:]) > after:
            shutil.rmtree(save)
    config = rundir.read_json(new / "config.json")
    rundir.write_json(new / "config.json", {**config, "name": name})
    with (new / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "tok')  # killed while writing


@contextmanager
def alone() -> Iterator[None]:
    """Without a launcher's variables: this process is one rank, without a group."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)
