"""`octo recipes list | show`: the recipes in a folder, and one of them as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_octo import console
from megatron_octo.cli.options import parser
from megatron_octo.config.base import Settings, to_dict
from megatron_octo.config.load import load_recipe, recipe_functions
from megatron_octo.errors import BadInput


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parser("recipes", "The recipes in a folder, and one of them as JSON.")
    commands = options.add_subparsers(dest="command", required=True, metavar="list | show")
    listing = commands.add_parser("list", help="a line for each recipe")
    listing.add_argument("folder", nargs="?", type=Path, default=Path("recipes"))
    listing.add_argument("--json", action="store_true", help="machine output")
    show = commands.add_parser("show", help="a recipe's settings as JSON")
    show.add_argument("recipe", metavar="RECIPE")
    own = options.parse_args(argv)
    if own.command == "list":
        _list(own.folder, as_json=own.json)
    else:
        console.emit_json(to_dict(load_recipe(own.recipe, Settings)))


def _list(folder: Path, *, as_json: bool) -> None:
    if not folder.is_dir():
        raise BadInput(f"no folder {folder}", fix="give the folder that holds your recipes")
    found = [
        {
            "recipe": f"{path}:{name}",
            "kind": type(function()).__name__,
            "about": (function.__doc__ or "").split("\n")[0],
        }
        for path in sorted(folder.glob("*.py"))
        for name, function in recipe_functions(path).items()
    ]
    if as_json:
        console.emit_json(found)
    else:
        console.table(f"recipes in {folder}", ("recipe", "kind", "about"), [tuple(row.values()) for row in found])
