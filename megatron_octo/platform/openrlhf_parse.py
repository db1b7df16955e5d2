"""`python -m megatron_octo.platform.openrlhf_parse ARGUMENTS`: OpenRLHF's parser and checks alone; prints JSON.

OpenRLHF parses inside its training script, whose imports (torch, vLLM, DeepSpeed) cost half a minute.
Empty stand-ins for them are enough to run the script up to its first act.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import runpy
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPT = "openrlhf.cli.train_ppo_ray"
STAND_INS = ("ray", "openrlhf.trainer", "openrlhf.utils")
REAL = "openrlhf.utils.config"


class Parsed(Exception):
    """The script has parsed and checked its arguments and is about to start."""

    def __init__(self, settings: Namespace) -> None:
        super().__init__()
        self.settings = settings


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules in which every name exists and does nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name == REAL or not any(name == each or name.startswith(f"{each}.") for each in STAND_INS):
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name == "openrlhf.utils":  # REAL lies in it
            folder = importlib.util.find_spec("openrlhf")
            spec.submodule_search_locations = [str(Path(folder.origin or "").parent / "utils")] if folder else []
        return spec

    def create_module(self, spec: Any) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stop if name == "get_strategy" else _Inert()


class _Inert:
    """A value that can be decorated with, called and looked into, and does nothing."""

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __getattr__(self, name: str) -> _Inert:
        return self


def stop(settings: Namespace) -> None:
    """Take the place of the first thing that the script does with its settings."""
    raise Parsed(settings)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """OpenRLHF's settings, nested as it nests them. Exits as its parser does where that refuses."""
    sys.meta_path.insert(0, _StandIns())
    sys.argv = [SCRIPT, *arguments]
    try:
        runpy.run_module(SCRIPT, run_name="__main__")
    except Parsed as done:
        return plain(done.settings)
    raise RuntimeError(f"{SCRIPT} ended without starting")


def plain(settings: Namespace) -> dict[str, Any]:
    """Nested namespaces as nested dictionaries."""
    return {
        name: plain(value) if hasattr(value, "__dict__") else value for name, value in sorted(vars(settings).items())
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(parse(sys.argv[1:]), default=str) + "\n")
