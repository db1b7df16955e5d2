"""Recipe file -> settings: `path.py:function`, or `path.py` alone, or a run's `config.json`.

`path.py` alone is its one function that fits the command, else the one called `pipeline`. `path.py:function@gpu` lays
a stage out as the file's `LAYOUTS`, a dict of `Layout`, says for that GPU. A recipe may import the files beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_octo.config.base import Settings, read_settings
from megatron_octo.config.rl import SET_AS_TEXT, ValidationSet
from megatron_octo.config.train import Layout, MidTrainConfig
from megatron_octo.errors import BadInput, OctoError, SettingsError
from megatron_octo.rundir import read_json

WHOLE = "pipeline"


def load_recipe[S: Settings](
    spec: str, kind: type[S] | tuple[type[S], ...], overrides: Sequence[str] = (), *, command: str = "octo"
) -> S:
    """Settings of class `kind`, or of one of several, that `spec` names, with `overrides` applied.

    An override is `--section.field value`, as on the command line.

    Runs the recipe file, which is the user's own code. A mistyped override ends the process with a
    message and exit code 2 (tyro's doing).

    Raises:
        BadInput: no such file or function, or settings that contradict themselves.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    file, _, rest = spec.partition(":")
    name, _, gpu = rest.partition("@")
    path = Path(file)
    if not path.is_file():
        raise BadInput(f"no recipe {spec!r}: there is no file {file}", fix=_nearest_file(path))
    if path.suffix == ".json":
        settings = read_settings(_kind_of_json(path, kinds), path)
    else:
        recipes = read_recipes(path)
        settings = _call(_pick(recipes.functions, name, kinds, f"{file}:{name}" if name else file), spec)
        if gpu:
            settings = _lay_out(settings, recipes.layouts, gpu, spec)
    return override(settings, overrides, prog=f"{command} {spec}")


def override[S: Settings](settings: S, overrides: Sequence[str], *, prog: str) -> S:
    """`settings` with `overrides` applied, as `load_recipe` does it.

    Raises:
        BadInput: the result contradicts itself.
    """
    if not overrides:
        return settings
    import tyro

    # The kind of a union field stays the recipe's; its fields are overridden like any others.
    try:
        return tyro.cli(
            type(settings),
            default=settings,
            args=list(overrides),
            prog=prog,
            config=(tyro.conf.AvoidSubcommands,),
            registry=_texts(),
        )
    except ValueError as error:  # a check across sections; tyro reports those inside one section itself
        if isinstance(error, SettingsError):
            raise
        raise BadInput(str(error), fix="correct the option") from error


def _texts() -> Any:
    """tyro's rule for what is a section of its own in a file and one text on the command line: tyro alone has no
    option for a list of sections, and of those that a recipe names one for each field."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def validation_sets(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        # tyro writes the type of a default of two sets as tuple[ValidationSet, ValidationSet]
        if info.type_origin is not tuple or ValidationSet not in typing.get_args(info.type):
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar=f"[{SET_AS_TEXT} ...]",
            instance_from_str=lambda texts: tuple(map(ValidationSet.of, texts)),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda sets: list(map(str, sets)),
        )

    return registry


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFile:
    """What a recipe file holds."""

    about: str
    """The first line of its docstring."""
    functions: dict[str, Callable[[], Settings]]
    """The recipes: its own public functions without parameters whose annotated result is a settings class."""
    layouts: dict[str, Layout]
    """Its `LAYOUTS`, if it has them: for each GPU, how a stage lies on it."""


def read_recipes(path: Path) -> RecipeFile:
    """Run a recipe file and say what it holds.

    Raises:
        BadInput: it fails.
    """
    module = _import(path)
    about = (module.__doc__ or "").split("\n")[0]
    return RecipeFile(about=about, functions=_functions(module), layouts=getattr(module, "LAYOUTS", {}))


def recipe_functions(path: Path) -> dict[str, Callable[[], Settings]]:
    """The recipes in a file."""
    return read_recipes(path).functions


def _functions(module: ModuleType) -> dict[str, Callable[[], Settings]]:
    found: dict[str, Callable[[], Settings]] = {}
    for name, function in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        if inspect.signature(function).parameters:
            continue  # a helper of the recipes beside it
        try:
            result = typing.get_type_hints(function).get("return")
        except NameError as error:
            what = f"recipe {module.__file__}:{name}: its annotation fails: {error}"
            raise BadInput(what, fix="import what it names") from None
        if isinstance(result, type) and issubclass(result, Settings):
            found[name] = function
    return found


def _import(path: Path) -> ModuleType:
    name = f"octo_recipe_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise BadInput(f"{path} is not a Python file", fix="give a recipe as path.py:function")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up here
    try:
        with _siblings(path.parent.resolve()):
            module_spec.loader.exec_module(module)
    except OctoError:
        raise
    except Exception as error:
        raise BadInput(f"recipe {path} fails to load: {type(error).__name__}: {error}", fix="correct it") from error
    return module


@contextlib.contextmanager
def _siblings(folder: Path) -> Iterator[None]:
    """Let a file import those beside it, as a script does; then forget them, so that another folder's may be called
    the same."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
                del sys.modules[name]


def _kind_of_json[S: Settings](path: Path, kinds: tuple[type[S], ...]) -> type[S]:
    """The class that shares the most field names with the file."""
    value = read_json(path) if len(kinds) > 1 else {}
    keys = set(value) if isinstance(value, dict) else set()
    return max(kinds, key=lambda kind: len(keys & {field.name for field in dataclasses.fields(kind)}))  # type: ignore[arg-type]


def _pick[S: Settings](
    functions: dict[str, Callable[[], Any]], name: str, kinds: tuple[type[S], ...], spec: str
) -> Callable[[], S]:
    fitting = {n: f for n, f in functions.items() if issubclass(typing.get_type_hints(f)["return"], kinds)}
    if not name and len(fitting) == 1:
        return next(iter(fitting.values()))
    if (name or WHOLE) in fitting:
        return fitting[name or WHOLE]
    listing, wanted = ", ".join(sorted(fitting)) or "none", " or ".join(kind.__name__ for kind in kinds)
    if not name:
        raise BadInput(
            f"recipe {spec!r} names no function and {spec} has not exactly one that returns {wanted}",
            fix=f"say which, as {spec}:NAME; there are: {listing}",
        )
    near = difflib.get_close_matches(name, fitting, n=1)
    if name in functions:
        result = typing.get_type_hints(functions[name])["return"].__name__
        what = f"recipe {spec!r} is a {result}; this command needs a {wanted}"
        raise BadInput(what, fix=f"choose among: {listing}")
    raise BadInput(
        f"unknown recipe {spec!r}",
        fix=f"{f'did you mean {near[0]!r}? ' if near else ''}functions annotated -> {wanted}: {listing}",
    )


def _call[S: Settings](function: Callable[[], S], spec: str) -> S:
    try:
        return function()
    except OctoError:
        raise
    except Exception as error:
        raise BadInput(f"recipe {spec!r} fails: {type(error).__name__}: {error}", fix="correct the recipe") from error


def _lay_out[S: Settings](settings: S, layouts: dict[str, Layout], gpu: str, spec: str) -> S:
    if not isinstance(settings, MidTrainConfig) or gpu not in layouts:
        raise BadInput(
            f"recipe {spec!r} has no layout for {gpu!r}",
            fix=f"choose among: {', '.join(layouts) or 'none'}; or leave it out and give --parallel.* and the like",
        )
    return typing.cast(S, layouts[gpu].of(settings))


def _nearest_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "give a recipe as path.py:function, or a run's config.json; `octo recipes list` shows those shipped"
