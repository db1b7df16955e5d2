"""`octo recipes list | show | diff`: the recipes in a folder, one of them as JSON, and what two of them differ in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_octo import console
from megatron_octo.cli.options import parser
from megatron_octo.config.base import Settings, to_dict
from megatron_octo.config.load import RecipeFile, load_recipe, read_recipes
from megatron_octo.errors import BadInput

RECIPE = "path.py:function, path.py:function@gpu, or a run's config.json"


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parser("recipes", "The recipes in a folder, one of them as JSON, and what two of them differ in.")
    commands = options.add_subparsers(dest="command", required=True, metavar="list | show | diff")
    listing = commands.add_parser("list", help="a line for each recipe")
    listing.add_argument("folder", nargs="?", type=Path, default=Path("recipes"))
    show = commands.add_parser("show", help="a recipe's settings as JSON")
    show.add_argument("recipe", metavar="RECIPE", help=RECIPE)
    diff = commands.add_parser("diff", help="the fields in which two recipes differ")
    diff.add_argument("old", metavar="RECIPE", help=RECIPE)
    diff.add_argument("new", metavar="RECIPE", help=RECIPE)
    for each in (listing, diff):
        each.add_argument("--json", action="store_true", help="machine output")
    own = options.parse_args(argv)
    if own.command == "list":
        _list(own.folder, as_json=own.json)
    elif own.command == "show":
        console.emit_json(to_dict(load_recipe(own.recipe, Settings)))
    else:
        _diff(own.old, own.new, as_json=own.json)


def _list(folder: Path, *, as_json: bool) -> None:
    if not folder.is_dir():
        raise BadInput(f"no folder {folder}", fix="give the folder that holds your recipes")
    files = {path: read_recipes(path) for path in sorted(folder.glob("*.py"))}
    if as_json:
        console.emit_json(
            [
                {"recipe": f"{path}:{name}", "kind": kind, "about": about, "layouts": list(file.layouts)}
                for path, file in files.items()
                for name, kind, about in _rows(file)
            ]
        )
        return
    console.emit("\n\n".join(_block(path, file) for path, file in files.items() if file.functions))


def _block(path: Path, file: RecipeFile) -> str:
    """A file's recipes as lines."""
    rows = _rows(file)
    width, kinds = (max(len(row[column]) for row in rows) for column in (0, 1))
    layouts = f" GPUs: @{', @'.join(file.layouts)}" if file.layouts else ""
    lines = (f"  {name:<{width}}  {kind:<{kinds}}  {about}" for name, kind, about in rows)
    return "\n".join([f"{path}: {file.about}{layouts}", *lines])


def _rows(file: RecipeFile) -> list[tuple[str, str, str]]:
    """(name, kind, first line of the docstring) of each recipe in a file."""
    return [
        (name, type(function()).__name__, (function.__doc__ or "").split("\n")[0])
        for name, function in file.functions.items()
    ]


def _diff(old: str, new: str, *, as_json: bool) -> None:
    before, after = (dict(_leaves(to_dict(load_recipe(spec, Settings)))) for spec in (old, new))
    fields = sorted(field for field in {**before, **after} if before.get(field) != after.get(field))
    if as_json:
        console.emit_json([{"field": each, "old": before.get(each), "new": after.get(each)} for each in fields])
        return
    width = max(map(len, fields), default=0)
    lines = [f"{each:<{width}}  {before.get(each, '-')} -> {after.get(each, '-')}" for each in fields]
    console.emit("\n".join(lines or ["no field differs"]))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field; what is in a list goes by its own name, if it has one."""
    if isinstance(value, list) and all(isinstance(each, dict) and "name" in each for each in value):
        value = {each["name"]: {key: it for key, it in each.items() if key != "name"} for each in value}
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else key)
    else:
        yield name, value
