"""The command line of one command: its own few options, and the recipe's overrides after them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command's own options; it does not guess at abbreviations."""
    return argparse.ArgumentParser(
        prog=f"octo {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def recipe_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command that takes a recipe; `--section.field value` pairs are left to the recipe."""
    more = "Other options override the recipe; `RECIPE --help` lists them."
    out = parser(command, f"{description}\n\n{more}")
    out.add_argument("recipe", metavar="RECIPE", help="path.py:function, or a run's config.json")
    return out


def parse_recipe(out: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(own options, overrides for the recipe). `RECIPE --help` goes to the recipe's own parser."""
    argv = list(argv)
    if argv and not argv[0].startswith("-") and ("--help" in argv or "-h" in argv):
        own, rest = out.parse_known_args([a for a in argv if a not in ("--help", "-h")])
        return own, [*rest, "--help"]
    own, rest = out.parse_known_args(argv)
    return own, rest
