"""What slurm/*.sh ask of Python: which `octo` command a job stands for, and whether the allocation fits it.

The scripts keep to what needs the batch system; nothing here talks to it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_octo import rundir
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.errors import BadInput
from megatron_octo.launch.pipeline import Stage, stage_file, stages

MODEL = "llama32_3b"
RECIPES = Path("recipes")
RL_RECIPES = RECIPES / "rl_zero.py"
LOGS = Path("slurm/logs")
SITE = Path("slurm/site.sh")
LEAST_FREE_BYTES = 1 << 30  # for what Slurm and the ranks print
SIGNAL_NOTICE_S = 60  # sbatch's own
MOST_NODES = 1024  # among which a number that fits is looked for
SBATCH_VARIABLES: Mapping[str, str] = {
    "SBATCH_GPUS_PER_NODE": "--gpus-per-node",
    "SBATCH_TIMELIMIT": "--time",
    "SBATCH_SIGNAL": "--signal",
    "SBATCH_OUTPUT": "--output",
    "SBATCH_ERROR": "--error",
}
"""What sbatch reads from the environment, of what is checked here; it knows none for nodes."""
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "prepare_data": ("data",),
    "convert": ("convert",),
    "evaluate": ("evaluate",),
    "report": ("report",),
}
"""Scripts whose arguments are those of an `octo` command."""
USAGE = {
    "stable_200b": "stable_200b.sh [--model MODEL[@GPU] | --recipe RECIPE] [OVERRIDES]",
    "decay_20b": "decay_20b.sh BRANCH [--model MODEL[@GPU]] [OVERRIDES], or decay_20b.sh --recipe RECIPE [OVERRIDES]",
    "rl": "rl.sh BRANCH [--model MODEL] [OVERRIDES], or rl.sh --recipe RECIPE [OVERRIDES]",
    **{script: f"{script}.sh, then what `octo {' '.join(command)}` takes" for script, command in COMMANDS.items()},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """An allocation."""

    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the tasks of a job run."""

    argv: tuple[str, ...]
    """The arguments of `octo`."""
    config: MidTrainConfig | RLConfig | None = None
    """The settings, overrides applied, where the job is one run."""

    @property
    def run(self) -> Path | None:
        """The run's folder: it holds DONE, STOP and saves."""
        match self.config:
            case MidTrainConfig():
                return rundir.run_folder(self.config.name)
            case RLConfig():
                return self.config.output
        return None


def job(script: str, args: Sequence[str]) -> Job:
    """The job that `slurm/SCRIPT.sh ARGS` stands for.

    Raises:
        BadInput: no such script, branch, model or setting.
    """
    if script not in USAGE:
        raise BadInput(f"no script slurm/{script}.sh", fix=f"there are: {', '.join(USAGE)}")
    if script in COMMANDS:
        return Job(argv=(*COMMANDS[script], *args))
    spec, overrides = _recipe(script, args)
    if script == "rl":
        return Job(argv=("rl", spec, *overrides), config=load_recipe(spec, RLConfig, overrides, command="octo rl"))
    config = load_recipe(spec, MidTrainConfig, overrides, command="octo train")
    return Job(argv=("train", spec, *overrides), config=config)


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeJob:
    """A job of a pipeline."""

    name: str
    after: tuple[str, ...]
    """Jobs that must have succeeded."""
    script: str
    args: tuple[str, ...]
    shape: Shape | None = None
    """That it needs; None for the script's own, or the user's."""


def tree(config: PipelineConfig) -> list[TreeJob]:
    """What is not DONE of a pipeline as jobs, each after those that it needs. `write_settings` writes what they read.

    Stages up to the stable run are a chain; branches part there, each with its export and its RL.
    """
    exports = {f"train {each.name}": f"export {each.name}" for each in (config.stable, *config.branches)}
    rl = tuple(each.name for each in config.rl)
    last, jobs = "", []
    for stage in stages(config):
        if stage.name == "reinforcement learning":
            jobs += [_rl_job(config, each, exports) for each in config.rl if not rundir.is_done(each.output)]
            continue
        before: tuple[str, ...] = (last,)
        match stage.argv[0]:
            case "convert" if stage.name.startswith("export"):
                before = (next(train for train, export in exports.items() if export == stage.name),)
            case "train" if stage.name != f"train {config.stable.name}":
                before = (f"train {config.stable.name}",)
            case "evaluate":
                before = tuple(exports.values()) if stage.argv[-1] == "before" else rl
            case "report":
                before = ("evaluate before RL", *(("evaluate after RL",) if config.evaluate_after else rl))
            case _:
                last = stage.name
        if not stage.done:
            jobs.append(TreeJob(name=stage.name, after=before, **_script(config, stage)))
    left = {each.name for each in jobs}
    return [replace(each, after=tuple(name for name in each.after if name in left)) for each in jobs]


def _script(config: PipelineConfig, stage: Stage) -> dict[str, Any]:
    command, *args = stage.argv
    if command == "train":
        script = "stable_200b" if stage.name == f"train {config.stable.name}" else "decay_20b"
        return {"script": script, "args": ("--recipe", args[0])}
    return {"script": {"data": "prepare_data"}.get(command, command), "args": tuple(args)}


def _rl_job(config: PipelineConfig, run: RLConfig, exports: Mapping[str, str]) -> TreeJob:
    made_of = (name.removeprefix("train ") for name in exports)
    parent = next((name for name in made_of if rundir.run_folder(name) in run.model.parents), "")
    settings = str(stage_file(config, run))
    args = ("--recipe", settings)
    shape = Shape(nodes=run.num_nodes, gpus_per_node=run.num_gpus)
    return TreeJob(name=run.name, after=(f"export {parent}",), script="rl", args=args, shape=shape)


def check_shape(config: MidTrainConfig | RLConfig | None, shape: Shape) -> str:
    """Refuse an allocation that the settings do not fit; returns the arithmetic.

    Raises:
        BadInput: so it is; the fix names a number of nodes that fits.
    """
    allocation = f"nodes   {shape.nodes} x {shape.gpus_per_node} GPUs = {shape.ranks} ranks"
    match config:
        case MidTrainConfig():
            return f"{allocation}\n{_train_plan(config, shape)}"
        case RLConfig() if config.num_nodes != shape.nodes or config.num_gpus > shape.gpus_per_node:
            raise BadInput(
                f"{config.name} asks for num_nodes {config.num_nodes} x num_gpus {config.num_gpus}, and the job has "
                f"{shape.nodes} nodes x {shape.gpus_per_node} GPUs",
                fix=f"sbatch --nodes={config.num_nodes} --gpus-per-node={config.num_gpus}, or "
                f"--num-nodes {shape.nodes} --num-gpus {shape.gpus_per_node}",
            )
    return allocation


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a job asks Slurm for, of what can be checked before."""

    shape: Shape
    logs: tuple[Path, ...]
    """The folders of what Slurm itself writes, which must be there."""


def requested(options: Sequence[str], script: Path) -> Request:
    """What `sbatch OPTIONS SCRIPT` asks for, in this environment.

    Raises:
        BadInput: there is no such script; or as `requested_by`.
    """
    if not script.is_file():
        raise BadInput(f"no such script: {script}", fix="run it in the repository's folder, as slurm/NAME.sh")
    lines = [line.removeprefix("#SBATCH") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    return requested_by(shlex.split(" ".join(lines), comments=True), os.environ, options)


def requested_by(directives: Sequence[str], environment: Mapping[str, str], options: Sequence[str] = ()) -> Request:
    """What a script's directives, sbatch's variables and its options ask for; as to sbatch, the later say more.

    Raises:
        BadInput: the time limit is over before the signal could be of use; or the shape is not two numbers.
    """
    variables = {name: value for name in SBATCH_VARIABLES if (value := environment.get(name))}
    sbatch = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sbatch.add_argument("-N", "--nodes", default="1")
    sbatch.add_argument("--gpus-per-node", default="0")
    sbatch.add_argument("-t", "--time", default="")
    sbatch.add_argument("--signal", default="")
    sbatch.add_argument("-o", "--output", default="slurm-%j.out")
    sbatch.add_argument("-e", "--error", default="")
    between = [f"{SBATCH_VARIABLES[name]}={value}" for name, value in variables.items()]
    asked, _ = sbatch.parse_known_args([*directives, *between, *options])
    by = "".join(f"; the environment has {name}={value}" for name, value in variables.items())
    notice = re.search(r"@(\d+)$", asked.signal)
    limit_s, notice_s = _seconds(asked.time), int(notice[1]) if notice else SIGNAL_NOTICE_S
    if limit_s and asked.signal and limit_s <= notice_s:
        raise BadInput(
            f"--time={asked.time} --signal={asked.signal}: the job would be asked to end as soon as it starts{by}",
            fix=f"a --time well above {notice_s:,} s, or a --signal less early: longer than a step and a save take",
        )
    try:
        shape = Shape(nodes=int(asked.nodes), gpus_per_node=int(re.sub(r"^.*:", "", asked.gpus_per_node)))
    except ValueError:
        raise BadInput(
            f"--nodes={asked.nodes} --gpus-per-node={asked.gpus_per_node}: not two numbers{by}",
            fix="give one number of nodes and one of GPUs: the recipe is checked against them",
        ) from None
    return Request(shape=shape, logs=tuple(_log_folders(asked.output, asked.error)))


def _log_folders(*files: str) -> Iterator[Path]:
    """Where Slurm writes them; above what it will fill in, as %j. A device has none."""
    for file in filter(None, files):
        if not Path(file).is_char_device():
            yield next(each for each in Path(file).parents if "%" not in str(each))


def _seconds(time: str) -> int:
    """Of a time limit as sbatch takes it: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]].

    0 for no limit, or one that sbatch will refuse itself.
    """
    days, dash, clock = time.rpartition("-")
    words = [*([days] if dash else []), *clock.split(":")]
    if not all(word.isdecimal() for word in words):
        return 0
    parts = list(map(int, words))
    if not dash:
        parts = [0, *parts] if len(parts) == 3 else [0, 0, *parts]
    return sum(part * size for part, size in zip(parts, (86_400, 3_600, 60, 1), strict=False))


def check_logs(checkout: Path = Path(), logs: Sequence[Path] = (LOGS,)) -> None:
    """Refuse to submit where the job of a `checkout` could not write what it says.

    Args:
        checkout: the repository's folder.
        logs: the folders of what Slurm itself writes: it makes none.

    Raises:
        BadInput: a log folder is missing, read-only or full.
    """
    for folder in (*logs, rundir.runs_root()):
        whole = (checkout / folder).absolute()
        there = next(each for each in (whole, *whole.parents) if each.exists())
        missing = folder in logs and there != whole
        if missing or not there.is_dir() or not os.access(there, os.W_OK):
            raise BadInput(
                f"log folder {checkout / folder} cannot be written",
                fix="make it, or its parent, yours to write; OCTO_RUNS names another root for runs",
            )
        if (free := shutil.disk_usage(there).free) < LEAST_FREE_BYTES:
            raise BadInput(
                f"log folder {checkout / folder}: {free:,} bytes are left on its disk",
                fix="free at least 1 GiB there, or let OCTO_RUNS name another disk",
            )


def _recipe(script: str, args: Sequence[str]) -> tuple[str, list[str]]:
    """(the recipe, its overrides)"""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--model", default=MODEL)
    own.add_argument("--recipe")
    has_branch = script != "stable_200b" and bool(args) and not args[0].startswith("-")
    found, overrides = own.parse_known_args(args[1:] if has_branch else args)
    if found.recipe:
        if has_branch:
            raise BadInput(f"branch {args[0]} and --recipe {found.recipe}", fix="give one of them")
        return found.recipe, overrides
    model, at, gpu = found.model.partition("@")
    if script == "stable_200b":
        return f"{RECIPES / model}.py:stable_200b{at}{gpu}", overrides
    if not has_branch:
        raise BadInput(f"{script}.sh: which branch?", fix=f"slurm/{USAGE[script]}; branches are short, long and hybrid")
    if script == "rl":
        return f"{RL_RECIPES}:{model}_{args[0]}", overrides
    return f"{RECIPES / model}.py:decay_{args[0]}{at}{gpu}", overrides


def _train_plan(config: MidTrainConfig, shape: Shape) -> str:
    try:
        return config.resolve(shape.ranks).arithmetic(config)
    except BadInput as error:
        fitting = [n for n in range(1, MOST_NODES + 1) if _fits(config, n * shape.gpus_per_node)]
        near = sorted(fitting, key=lambda n: abs(n - shape.nodes))[:2]
        fix = f"sbatch --nodes={' or --nodes='.join(map(str, sorted(near)))}, or {error.fix}" if near else error.fix
        raise BadInput(f"{shape.nodes} nodes x {shape.gpus_per_node} GPUs: {error.what}", fix=fix) from None


def _fits(config: MidTrainConfig, ranks: int) -> bool:
    try:
        config.resolve(ranks)
    except BadInput:
        return False
    return True
