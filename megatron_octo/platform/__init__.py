"""Where the code runs: which device, which backend, which layers, and what is missing.

`resolve` only looks. `Platform.activate` is what training and conversion call before they import
megatron; this package holds all that patches other people's code (`megatron_cpu`, `rotary`, `fused_adam`,
`checkpoint_writer`, `shards`).
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatron_octo.errors import OctoError


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """Something this machine does not have, what that costs, and how to get it."""

    what: str
    effect: str
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """What a megatron-core process uses on this machine."""

    device: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]
    layer_family: Literal["transformer_engine", "local"]
    """Whose linear layers, norms and attention `model/layers.py` builds from."""
    chip: tuple[int, ...] = ()
    """The GPU's compute capability; empty without one."""
    cuda: tuple[int, ...] = ()
    """The version of CUDA that torch was built for; empty for none."""
    engine: tuple[int, ...] = ()
    """Transformer Engine's version; empty for none."""
    apex: bool = False
    """Whether NVIDIA apex gives the local layers fused norms and gradient accumulation."""
    missing: tuple[Missing, ...] = ()

    def activate(self) -> None:
        """Make this process ready to import megatron.core. Calling it again changes nothing.

        On a GPU, choose the device of the local rank before this.
        """
        _quiet()
        if self.device == "cpu":
            from megatron_octo.platform import megatron_cpu, rotary

            megatron_cpu.install()
            rotary.install()
        from megatron_octo.platform import checkpoint_writer, fused_adam, shards

        fused_adam.install()
        checkpoint_writer.install()
        shards.install()

    def fix_order(self) -> None:
        """Have attention layers of Transformer Engine that are made from now on sum gradients in one order."""
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # each reads it when it is made

    def describe(self) -> str:
        """One line for the log."""
        layers = {"transformer_engine": "Transformer Engine", "local": "local"}[self.layer_family]
        return f"{self.device}, {self.backend}, {layers} layers"


def resolve() -> Platform:
    """Look at this machine and decide.

    Raises:
        OctoError: torch or megatron-core is not installed.
    """
    for package, extra in (("torch", "train"), ("megatron.core", "train")):
        if not _installed(package):
            raise OctoError(
                f"{package} is not installed", fix=f"`make setup`, or `pip install 'megatron_octo[{extra}]'`"
            )
    _quiet()
    import torch

    if not torch.cuda.is_available():
        return Platform(
            device="cpu",
            backend="gloo",
            layer_family="local",
            missing=(
                Missing(
                    what="GPU",
                    effect="megatron-core runs on the CPU over gloo, for small models only",
                    fix="run on a machine with an NVIDIA GPU, its driver, and a CUDA build of torch",
                ),
            ),
        )
    missing = tuple(_missing_on_gpu())
    family: Literal["transformer_engine", "local"] = (
        "local" if any(each.what == "Transformer Engine" for each in missing) else "transformer_engine"
    )
    return Platform(
        device="cuda",
        backend="nccl",
        layer_family=family,
        chip=torch.cuda.get_device_capability(),
        cuda=_numbers(torch.version.cuda),
        engine=_numbers(metadata.version("transformer-engine")) if family == "transformer_engine" else (),
        apex=has_apex(),
        missing=missing,
    )


def _missing_on_gpu() -> list[Missing]:
    missing = []
    if not has_engine():
        missing.append(
            Missing(
                what="Transformer Engine",
                effect="local layers: slower, no FP8, no context parallelism",
                fix="pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]==2.20.2'",
            )
        )
    if not has_apex():
        missing.append(
            Missing(
                what="NVIDIA apex",
                effect="no fused gradient accumulation; without Transformer Engine, no fused optimizer and norms",
                fix="build it from https://github.com/NVIDIA/apex (the package index's `apex` is another project)",
            )
        )
    return missing


def has_engine() -> bool:
    """Whether Transformer Engine is there whole: its torch part, built by itself, is a file in one of its folders."""
    spec = find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    places = (package / "wheel_lib", package, package.parent)  # a wheel's, a source build's, an editable one's
    return any(file for place in places for file in place.glob("transformer_engine_torch*.so"))


def has_apex() -> bool:
    """Whether NVIDIA apex is installed, told by its extensions: the package index's `apex` is another project."""
    return all(map(_installed, ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")))


def _quiet() -> None:
    """Drop what megatron and torch say of each other's age and of missing extensions; `octo doctor` says the latter."""
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.CRITICAL)  # train/again.py speaks for it
    for module in ("megatron", "torch"):
        for category in (FutureWarning, UserWarning, SyntaxWarning):
            warnings.filterwarnings("ignore", category=category, module=module)


def _numbers(version: str) -> tuple[int, ...]:
    """2.9.0+af2f3 -> (2, 9, 0)"""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
