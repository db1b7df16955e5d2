"""The command line of one command: its own few options, and the recipe's overrides after them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_octo.config.base import Settings
from megatron_octo.errors import BadInput


class Parser(argparse.ArgumentParser):
    """Does not guess at abbreviations, and names the option that was meant. Subcommands' parsers are of it too."""

    def __init__(self, **options: Any) -> None:
        formatter = options.pop("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{**options, "allow_abbrev": False, "formatter_class": formatter})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what is left over is refused with the nearest option.

        Raises:
            BadInput: an argument is none of these.
        """
        own, rest = self.parse_known_args(args, namespace)
        if rest:
            refuse_mistyped(self, rest, ())
            raise BadInput(f"unknown argument {rest[0]!r}", fix=f"`{self.prog} --help` lists them")
        return own


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command's own options."""
    return Parser(prog=f"octo {command}", description=description)


def recipe_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command that takes a recipe; `--section.field value` pairs are left to the recipe."""
    more = "Other options override the recipe; `RECIPE --help` lists them."
    out = parser(command, f"{description}\n\n{more}")
    out.add_argument("recipe", metavar="RECIPE", help="path.py:function, path.py:function@gpu, or a run's config.json")
    return out


def parse_recipe(
    out: argparse.ArgumentParser, argv: Sequence[str], kinds: Sequence[type[Settings]]
) -> tuple[argparse.Namespace, list[str]]:
    """(own options, overrides for a recipe that is one of `kinds`). `RECIPE --help` goes to the recipe's own parser.

    Raises:
        BadInput: an option is no field of `kinds` and looks like one of the own options.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-") and ("--help" in argv or "-h" in argv):
        own, rest = out.parse_known_args([a for a in argv if a not in ("--help", "-h")])
        return own, [*rest, "--help"]
    own, rest = out.parse_known_args(argv)
    refuse_mistyped(out, rest, kinds)
    return own, rest


def at_least_one(text: str) -> int:
    """A count, for argparse's `type`."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def refuse_mistyped(out: argparse.ArgumentParser, rest: Sequence[str], kinds: Sequence[type[Settings]]) -> None:
    """Refuse what looks like an own option: the recipe's parser knows its fields alone and could not name it.

    Raises:
        BadInput: an option of `rest` is no field of `kinds` and looks like one of `out`.
    """
    fields = {f"--{field.name}".replace("_", "-") for kind in kinds for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    own = list(_options(out))
    for option in (arg.partition("=")[0] for arg in rest if arg.startswith("--")):
        near = difflib.get_close_matches(option, own, n=1, cutoff=0.8)
        if near and near[0] != option and "." not in option and option.replace("_", "-") not in fields:
            raise BadInput(f"unknown option {option}", fix=f"did you mean {near[0]}?")


def _options(out: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a parser and of its subcommands."""
    for action in out._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _options(each)
