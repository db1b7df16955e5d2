"""What Transformer Engine's FP8 recipes need of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_octo.platform import Platform

Version = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What one recipe needs."""

    chips: str
    """The GPUs that can, for people."""
    chip_from: Version
    """Lowest compute capability."""
    chip_below: Version
    """Compute capability that can no more."""
    engine: Version
    """Lowest version of Transformer Engine."""
    cuda: Version
    """Lowest version of CUDA, which decides cuBLAS's."""


# Transformer Engine's own checks (transformer_engine/pytorch/quantization.py) and megatron-core's (fp8_utils.py). On
# Blackwell, Transformer Engine computes blockwise as mxfp8: another recipe by that name.
NEEDS = {
    "delayed": Need(chips="Ada, Hopper or later", chip_from=(8, 9), chip_below=(99,), engine=(2, 1), cuda=(12, 1)),
    "tensorwise": Need(chips="Ada, Hopper or later", chip_from=(8, 9), chip_below=(99,), engine=(2, 2), cuda=(12, 1)),
    "blockwise": Need(chips="Hopper", chip_from=(9, 0), chip_below=(10, 0), engine=(2, 3), cuda=(12, 9)),
    "mxfp8": Need(chips="Blackwell (B200, GB200)", chip_from=(10, 0), chip_below=(12, 0), engine=(2, 1), cuda=(12, 8)),
}


def lacking(recipe: str, platform: Platform) -> str | None:
    """What the machine lacks for an FP8 recipe, with what it has instead; None where the recipe runs."""
    need = NEEDS[recipe]
    if platform.device == "cpu":
        return f"a GPU ({need.chips})"
    if platform.layer_family != "transformer_engine":
        return "Transformer Engine"
    if not need.chip_from <= platform.chip < need.chip_below:
        return f"{need.chips}; this GPU has compute capability {_dotted(platform.chip)}"
    if platform.engine < need.engine:
        return f"Transformer Engine {_dotted(need.engine)}; here is {_dotted(platform.engine)}"
    if platform.cuda < need.cuda:
        return f"CUDA {_dotted(need.cuda)}; torch was built for {_dotted(platform.cuda)}"
    return None


def running(platform: Platform) -> list[str]:
    """The recipes that run on this machine."""
    return [recipe for recipe in NEEDS if lacking(recipe, platform) is None]


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
