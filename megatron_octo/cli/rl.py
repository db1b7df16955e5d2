"""`octo rl RECIPE...`: R1-Zero reinforcement learning on OpenRLHF; several runs share one Ray cluster."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from typing import Any

from megatron_octo import console, rundir
from megatron_octo.cli.options import parser, refuse_mistyped
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.errors import BadInput

ENTRY = "openrlhf.cli.train_ppo_ray"
ABOUT = (
    "Reinforcement learning with OpenRLHF (GRPO, vLLM rollouts): checkpoints, metrics and hf/ in the run's folder.\n"
    "Several recipes run one after the other on one Ray cluster; a pipeline stands for all its RL runs.\n"
    "Runs that are done are skipped; one that was killed goes on from its last checkpoint.\n\n"
    "With one recipe other options override it: octo rl RECIPE --help lists them."
)


log = console.logger(__name__)

KINDS: tuple[type[RLConfig | PipelineConfig], ...] = (RLConfig, PipelineConfig)
OWN_FLAGS = ("--dry-run", "--json")


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parser("rl", ABOUT)
    options.add_argument("recipes", nargs="+", metavar="RECIPE", help="path.py:function, or a run's config.json")
    options.add_argument("--dry-run", action="store_true", help="print OpenRLHF's command line, start nothing")
    options.add_argument("--json", action="store_true", help="machine output")
    specs = list(itertools.takewhile(lambda arg: not arg.startswith("-"), argv))
    rest = list(argv[len(specs) :])
    if specs:  # what follows the recipes and is not ours overrides them
        own = options.parse_args([*specs, *(arg for arg in rest if arg in OWN_FLAGS)])
        overrides = [arg for arg in rest if arg not in OWN_FLAGS]
        refuse_mistyped(options, overrides, KINDS)
        configs = _configs(own.recipes, overrides)
    else:
        own = options.parse_args(rest)
        configs = _configs(own.recipes, [])
    if own.dry_run:
        _dry_run(configs, as_json=own.json)
        return
    from megatron_octo.rl.run import HF, run_all

    run_all(configs)
    if own.json:
        done = [config for config in configs if rundir.is_done(config.output)]
        console.emit_json([{"name": config.name, "hf": str(config.output / HF)} for config in done])


def _configs(specs: Sequence[str], overrides: Sequence[str]) -> list[RLConfig]:
    """The RL runs that the recipes stand for, in order."""
    if overrides and len(specs) > 1 and not {"-h", "--help"} & set(overrides):
        raise BadInput(
            f"{' '.join(overrides)}: options for {len(specs)} recipes at once", fix="override one recipe at a time"
        )
    configs: list[RLConfig] = []
    for spec in specs:
        loaded = load_recipe(spec, KINDS, overrides, command="octo rl")
        configs.extend([loaded] if isinstance(loaded, RLConfig) else loaded.rl)
    outputs = [config.output for config in configs]
    twice = next((output for output in outputs if outputs.count(output) > 1), None)
    if twice is not None:
        raise BadInput(f"two runs would write to {twice}", fix="give each recipe once, and each run its own output")
    return configs


def _dry_run(configs: Sequence[RLConfig], *, as_json: bool) -> None:
    """Show the command line of each run as this machine would start it, and check what is there already."""
    from megatron_octo.data.read import names_files
    from megatron_octo.rl.command import check_command, command
    from megatron_octo.rl.preflight import check_cluster, check_files, check_machine, has_gpu
    from megatron_octo.rl.run import check_settings

    shown: list[dict[str, Any]] = []
    cuda = has_gpu()
    if not cuda:
        log.warning(
            "no GPU here: this is the command for a CPU; on a GPU OpenRLHF also gets NCCL in place of gloo, sleeping "
            "engines, flash attention and gradient checkpointing"
        )
    for config in configs:
        check_settings(config)
        check_cluster(config)
        check_machine(config, cuda=cuda)
        files = (config.model, config.prompts, *(each.prompts for each in config.validation.sets))
        missing = [str(path) for path in files if not names_files(path)]
        if missing:
            log.warning("%s: not there yet, so model and prompts are not checked: %s", config.name, ", ".join(missing))
        passes = 1 if missing else check_files(config, cuda=cuda)[0].num_episodes
        state = "done" if rundir.is_done(config.output) else "to run"
        for stage in config.stages:
            arguments = command(config, stage=stage, num_episodes=passes, cuda=cuda)
            check_command(arguments)
            where = {"name": config.name, "output": str(config.output), "state": state, "to_step": stage.end}
            shown.append({**where, "arguments": arguments})
    if as_json:
        console.emit_json(shown)
        return
    for run in shown:
        line = shlex.join(("python", "-m", ENTRY, *run["arguments"]))
        console.emit(f"# {run['name']} to step {run['to_step']} ({run['state']}) -> {run['output']}\n{line}\n")
