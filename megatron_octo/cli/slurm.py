"""`octo slurm check | plan | tree | preflight | node`: what slurm/*.sh ask before a job, and in it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megatron_octo import console, rundir
from megatron_octo.cli.options import parser
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.launch.pipeline import check, write_settings
from megatron_octo.launch.preflight import driver, faults, node_name
from megatron_octo.launch.slurm import Job, Shape, check_logs, check_shape, job, requested, tree
from megatron_octo.platform.process import terminate_as_interrupt
from megatron_octo.report.jobs import queue, records
from megatron_octo.rl.cluster import ADDRESS

LOCK_GRACE_S = 660.0
"""Ranks that outlive their start, on a node that Slurm lost, end themselves: their watchdog waits 540 s for a step."""
TRAINING = ("stable_200b", "decay_20b")  # whose jobs get the options of slurm/pipeline.sh


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parser("slurm", "What slurm/*.sh ask. `sbatch slurm/NAME.sh` needs none of these by hand.")
    commands = options.add_subparsers(dest="command", required=True, metavar="check | plan | tree | preflight | node")
    before = commands.add_parser(
        "check", help="would `sbatch OPTIONS slurm/NAME.sh ARGUMENTS` fit? prints the comment that names its run"
    )
    before.add_argument("words", nargs=argparse.REMAINDER, metavar="-- [OPTIONS] slurm/NAME.sh [ARGUMENTS]")
    before.set_defaults(run=_check)
    plan = commands.add_parser("plan", help="what a job runs; refuses settings and inputs that are wrong")
    plan.add_argument("--nodes", type=int, required=True)
    plan.add_argument("--gpus-per-node", type=int, required=True)
    plan.add_argument("--records", type=Path, required=True, help="folder for argv, run, plan.txt and config.json")
    plan.add_argument("words", nargs=argparse.REMAINDER, metavar="NAME [ARGUMENTS]")
    plan.set_defaults(run=_plan)
    pipeline = commands.add_parser(
        "tree", help="the jobs of a pipeline, a line each: name, after, sbatch's options, comment, script, arguments"
    )
    pipeline.add_argument("words", nargs=argparse.REMAINDER, metavar="-- [OPTIONS] RECIPE")
    pipeline.set_defaults(run=_tree)
    preflight = commands.add_parser(
        "preflight", help="is this node fit? prints `NODE ok`, its time in seconds and its driver, or `NODE bad: why`"
    )
    preflight.add_argument("--gpus", type=int, default=0, help="GPUs that it must have")
    preflight.add_argument("--command", default="", help="a check of the site's own")
    preflight.set_defaults(run=_preflight)
    node = commands.add_parser("node", help="a node's part in RL on several: the first runs `octo rl`, the others join")
    node.add_argument("--gpus", type=int, required=True, help="GPUs that it brings")
    node.add_argument("--token", type=Path, required=True, help="file for Ray's token, which the first one writes")
    node.add_argument("--peer", default="", help="another node, by the way to which the first finds its address")
    node.add_argument("words", nargs=argparse.REMAINDER, metavar="-- rl ARGUMENTS")
    node.set_defaults(run=_node)
    own = options.parse_args(argv)
    own.run(own)


def _check(own: argparse.Namespace) -> None:
    words = own.words[1:] if own.words[:1] == ["--"] else own.words
    at = next((n for n, word in enumerate(words) if word.endswith(".sh")), None)
    if at is None:
        raise BadInput(
            f"no script in {' '.join(words)!r}", fix="give sbatch's options, slurm/NAME.sh and its arguments"
        )
    options, script, args = words[:at], Path(words[at]), words[at + 1 :]
    asked = requested(options, script)
    found = job(script.stem, args)
    if not found.config:
        importlib.import_module(f"megatron_octo.cli.{found.argv[0]}").parse(found.argv[1:])
    console.logger(__name__).info("%s\n%s", script, check_shape(found.config, asked.shape))
    check_logs(logs=asked.logs)
    console.emit(_comment(found))


def _tree(own: argparse.Namespace) -> None:
    *options, recipe = own.words[1:] if own.words[:1] == ["--"] else own.words
    config = load_recipe(recipe, PipelineConfig, command="slurm/pipeline.sh")
    for stage in (config.stable, *config.branches):
        check_shape(stage, requested(options, Path("slurm/stable_200b.sh")).shape)
    left = tree(config)
    for script in sorted({each.script for each in left}):
        check_logs(logs=requested(options if script in TRAINING else (), Path(f"slurm/{script}.sh")).logs)
    check(config)
    write_settings(config)
    jobs = [(each, job(each.script, each.args)) for each in left]
    _check_queue([found.run for _, found in jobs if found.run])
    for each, found in jobs:
        asked = f"--nodes={each.shape.nodes} --gpus-per-node={each.shape.gpus_per_node}" if each.shape else "-"
        columns = (each.name, ",".join(each.after) or "-", asked, _comment(found), each.script)
        console.emit("\t".join((*columns, *each.args)))


def _comment(found: Job) -> str:
    """By which `octo runs` knows a job that has not started: its run's folder, or that of all records."""
    return str((found.run or records()).absolute())


def _check_queue(runs: Sequence[Path]) -> None:
    """Refuse runs that a job of Slurm's is there for already.

    Raises:
        BadInput: so it is.
    """
    wanted = {str(run.absolute()) for run in runs}
    if there := [str(job) for job, queued in sorted((queue() or {}).items()) if queued.comment in wanted]:
        raise BadInput(
            f"Slurm has jobs of these runs: {', '.join(there)}",
            fix=f"let them end, or cancel them: scancel {' '.join(there)}",
        )


def _plan(own: argparse.Namespace) -> None:
    script, *args = own.words
    shape = Shape(nodes=own.nodes, gpus_per_node=own.gpus_per_node)
    found = job(script, args)
    # before what may be refused: that is told of the run
    rundir.write_atomic(own.records / "run", f"{found.run.absolute()}\n" if found.run else "")
    arithmetic = check_shape(found.config, shape)
    console.logger(__name__).info("octo %s\n%s", " ".join(found.argv), arithmetic)
    _check_inputs(found, shape)
    rundir.write_atomic(own.records / "plan.txt", arithmetic + "\n")
    if found.config:
        rundir.write_json(own.records / "config.json", to_dict(found.config))
    packages = sorted(f"{each.name}=={each.version}\n" for each in metadata.distributions())
    rundir.write_atomic(own.records / "packages.txt", "".join(packages))
    rundir.write_atomic(own.records / "argv", "".join(f"{arg}\n" for arg in found.argv))


def _check_inputs(found: Job, shape: Shape) -> None:
    """Refuse what the tasks would refuse one and all; of commands other than training that is their dry run.

    Raises:
        BadInput: so it is.
    """
    if found.run and os.environ.get("SLURM_RESTART_COUNT") and rundir.in_use(found.run):
        console.logger(__name__).warning("%s is in use: by ranks that outlived their start? waits for them", found.run)
        rundir.wait_until_free(found.run, grace_s=LOCK_GRACE_S)
    if isinstance(found.config, MidTrainConfig):
        from megatron_octo.train import run

        if not run.finished(found.config):
            run.check(found.config, shape.ranks)
        return
    if found.argv[0] == "rl" and shape.nodes > 1:
        os.environ.setdefault(ADDRESS, f"{node_name()}:0")  # the ranks will make one cluster of the job's nodes
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(f"megatron_octo.cli.{found.argv[0]}").main([*found.argv[1:], "--dry-run"])


def _preflight(own: argparse.Namespace) -> None:
    found = faults(num_gpus=own.gpus, runs=rundir.runs_root(), command=own.command)
    said = f"bad: {'; '.join(found)}" if found else f"ok {time.time():.0f} {driver() if own.gpus else '-'}"
    console.emit(f"{node_name()} {said}")
    if found:
        raise OctoError(f"node {node_name()} is not fit: {'; '.join(found)}", fix="leave it out: sbatch --exclude")


def _node(own: argparse.Namespace) -> None:
    from megatron_octo.rl.node import Meeting, follow, lead

    host = _address(os.environ["MASTER_ADDR"], own.peer)
    port, token = int(os.environ["MASTER_PORT"]), own.token.absolute()
    meeting = Meeting(host=host, port=port, token=token, num_gpus=own.gpus)
    with terminate_as_interrupt():
        if os.environ["SLURM_PROCID"] != "0":
            follow(meeting)
        elif code := lead(meeting, own.words[1:]):
            sys.exit(code)


def _address(name: str, peer: str) -> str:
    """Of a node, as its `peer` reaches it: to itself it may be 127.0.1.1, by Debian's /etc/hosts."""
    address = socket.gethostbyname(name)
    if not address.startswith("127.") or not peer:
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((peer, 9))  # sends nothing
        return str(route.getsockname()[0])
