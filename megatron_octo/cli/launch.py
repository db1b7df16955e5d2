"""`octo launch RECIPE --on slurm|local|kubernetes|skypilot`: one stage through NeMo-Run."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_octo import console
from megatron_octo.cli.options import at_least_one, parse_recipe, recipe_parser
from megatron_octo.config.load import load_recipe
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.errors import BadInput
from megatron_octo.launch.slurm import SITE, Job, Shape, check_logs, check_shape, requested_by

KINDS: tuple[type[MidTrainConfig | RLConfig], ...] = (MidTrainConfig, RLConfig)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = recipe_parser(
        "launch", "Launch a training or RL run through NeMo-Run (an extra): here, on Slurm or Kubernetes."
    )
    options.add_argument("--on", choices=("slurm", "local", "kubernetes", "skypilot"), required=True, help="where")
    options.add_argument("--nodes", type=at_least_one, help="nodes (default: 8, for RL as many as it asks for; here 1)")
    options.add_argument("--gpus-per-node", type=at_least_one, help="ranks of a node (default: 8; here 1)")
    options.add_argument("--time", default="24:00:00", help="on Slurm: the time limit of each start (24:00:00)")
    options.add_argument("--account", default="", help="on Slurm")
    options.add_argument("--partition", help="on Slurm")
    options.add_argument("--host", default="", help="on Slurm: a login node to submit from, by ssh")
    options.add_argument("--user", default="", help="whose account that is")
    options.add_argument("--checkout", type=Path, default=Path.cwd(), help="the repository's folder there (this one)")
    options.add_argument("--image", default="", help="on Kubernetes: container image, run in the repository's folder")
    options.add_argument("--namespace", default="default", help="on Kubernetes")
    options.add_argument(
        "--volume", default="", metavar="CLAIM:PATH", help="on Kubernetes, by SkyPilot too: claim for runs, its path"
    )
    options.add_argument("--gpu", default="", help="by SkyPilot: the GPU's name there, as in `sky gpus list`")
    options.add_argument("--wait", action="store_true", help="on Slurm: follow the job; exit as it does")
    options.add_argument("--dry-run", action="store_true", help="print what would be submitted; touch nothing")
    own, overrides = parse_recipe(options, argv, KINDS)
    config = load_recipe(own.recipe, KINDS, overrides, command="octo launch")
    command = "rl" if isinstance(config, RLConfig) else "train"
    job = Job(argv=(command, own.recipe, *overrides), config=config)
    default = Shape(nodes=8, gpus_per_node=8) if own.on != "local" else Shape(nodes=1, gpus_per_node=1)
    nodes = own.nodes or (config.num_nodes if isinstance(config, RLConfig) else default.nodes)
    shape = Shape(nodes=nodes, gpus_per_node=own.gpus_per_node or default.gpus_per_node)
    if own.on in ("kubernetes", "skypilot"):
        _check_kubernetes(own, command)
    from megatron_octo.launch import nemo

    if own.on == "slurm":  # by ssh sbatch gets none of this environment
        directives = [f"--nodes={shape.nodes}", f"--gpus-per-node={shape.gpus_per_node}"]
        directives += [f"--time={own.time}", f"--signal={nemo.SIGNAL}"]
        shape = requested_by(directives, {} if own.host else os.environ).shape
    arithmetic = check_shape(config, shape)
    console.logger(__name__).info("%s", arithmetic)
    nemo.require_nemo_run()
    if not own.host:
        own.checkout = own.checkout.absolute()
    settings = {each.name: getattr(own, each.name) for each in fields(nemo.Target) if each.name != "shape"}
    target = nemo.Target(shape=shape, **settings)
    if own.dry_run:
        shown = {"slurm": nemo.sbatch_text, "kubernetes": nemo.manifest, "skypilot": nemo.manifest}.get(own.on)
        console.emit(shown(job, target) if shown else f"octo {' '.join(job.argv)}")
        return
    if own.on == "slurm" and not own.host:
        _check_here(own.checkout)
    console.emit(nemo.launch(job, target, wait=own.wait))


def _check_kubernetes(own: argparse.Namespace, command: str) -> None:
    """Refuse what cannot be run there.

    Raises:
        BadInput: it is RL, there is no image or no volume; for SkyPilot, there is no GPU, or it is to be followed.
    """
    if command != "train":
        raise BadInput(f"--on {own.on} runs training only", fix="launch RL with --on slurm")
    claim, _, path = own.volume.partition(":")
    if not own.image or not claim or not path.startswith("/"):
        raise BadInput(
            f"--on {own.on} with --image {own.image!r} --volume {own.volume!r}",
            fix="name an image that holds megatron_octo, and a claim for the runs: --image IMAGE --volume CLAIM:/PATH",
        )
    if own.on == "skypilot" and not own.gpu:
        raise BadInput("--on skypilot without --gpu", fix="name one as SkyPilot does: --gpu H100; `sky gpus list`")
    if own.on == "skypilot" and own.wait:
        raise BadInput(
            "--on skypilot --wait: NeMo-Run hears no end of a job whose nodes SkyPilot has given back",
            fix="leave --wait out; the command names the `sky logs` that follows the job and exits as it does",
        )


def _check_here(checkout: Path) -> None:
    """Refuse to submit from a machine that cannot.

    Raises:
        BadInput: there is no Slurm, no site file, or no room for logs.
    """
    if shutil.which("sbatch") is None:
        raise BadInput("no Slurm here: sbatch is not on PATH", fix="run this on a login node, or name one by --host")
    if not (checkout / SITE).is_file():
        raise BadInput(
            f"no site file {checkout / SITE}",
            fix=f"let --checkout name the repository's folder; in it copy one of slurm/sites/ to {SITE} and fill it in",
        )
    check_logs(checkout)
