"""`octo COMMAND ...`: finds the command, runs it, turns errors into messages and exit codes.

Nothing heavy is imported before the command itself does it: `octo --help` answers in half a second.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from megatron_octo import __version__

COMMANDS = {
    "data": "generate, tokenizer, prepare, inspect: from text to indexed data sets",
    "train": "a mid-training stage: stable, or a decay branch",
    "convert": "from-hf, to-hf, verify, random-base: Hugging Face <-> Megatron, checked",
    "rl": "R1-Zero reinforcement learning on OpenRLHF",
    "evaluate": "sample and grade answers with vLLM",
    "pipeline": "the stages in a row; resumes where it stopped",
    "report": "one page: lineage, curves, accuracy before and after RL",
    "slurm": "check, plan, tree, preflight, node: what slurm/*.sh ask before and in a job",
    "launch": "a training or RL run through NeMo-Run, on Slurm or here",
    "runs": "list, tree, show: how far each run is, who descends from whom",
    "recipes": "list, show: the recipes in a folder",
    "doctor": "what is installed, what each stage can do here, how to get what is missing",
}
VERBOSE = ("-v", "--verbose")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 bad input, 3 stopped by the watch, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    verbose = any(arg in VERBOSE for arg in args)
    args = [arg for arg in args if arg not in VERBOSE]
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"megatron_octo {__version__}\n")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `octo {near[0]}`?" if near else f"commands: {', '.join(COMMANDS)}"
        sys.stderr.write(f"octo: unknown command {name!r}\n  fix: {hint}\n")
        return 2
    return _run(name, rest, verbose=verbose)


def _run(name: str, rest: list[str], *, verbose: bool) -> int:
    from megatron_octo import console
    from megatron_octo.errors import OctoError

    console.configure(verbose=verbose)
    try:
        importlib.import_module(f"megatron_octo.cli.{name}").main(rest)
    except OctoError as error:
        console.logger(__name__).error("octo %s: %s", name, error, exc_info=verbose)
        return error.exit_code
    except KeyboardInterrupt:
        console.logger(__name__).error("octo %s: interrupted; run it again to continue", name)
        return INTERRUPTED
    except Exception as error:
        if verbose or console.rank() != 0:
            raise
        console.logger(__name__).error("octo %s: %s: %s (-v shows where)", name, type(error).__name__, error)
        return 1
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return (
        "usage: octo COMMAND [...]\n\n"
        "Mid-training that makes base language models ready for reinforcement learning.\n\n"
        f"{lines}\n\n"
        "octo COMMAND --help says more. Every command takes -v (tracebacks and debug lines).\n"
    )
