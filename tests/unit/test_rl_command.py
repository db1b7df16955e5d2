"""OpenRLHF's command line, judged by OpenRLHF's own parser."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.config.rl import RLConfig, RLWatchConfig, ValidationConfig, ValidationSet
from megatron_octo.errors import BadInput, SettingsError
from megatron_octo.rl.command import CPU_PATCHES, check_command, command, environment

CONFIG = RLConfig(
    name="rl-test",
    model=Path("model"),
    prompts=Path("prompts.jsonl"),
    output=Path("out"),
    num_steps=3,
    prompts_per_step=8,
    samples_per_prompt=16,
    updates_per_step=2,
    learning_rate=1.5e-4,
    clip_low=0.2,
    clip_high=0.28,
    temperature=0.9,
    max_prompt_tokens=64,
    max_response_tokens=112,
    max_tokens_per_gpu=1024,
    zero_stage=2,
    num_gpus=4,
    save_every_steps=10,
    seed=5,
)


def parsed(config: RLConfig, *, cuda: bool, num_episodes: int = 1) -> dict[str, Any]:
    """What OpenRLHF itself makes of the command line."""
    pytest.importorskip("openrlhf", reason="openrlhf is not installed")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron_octo.platform.openrlhf_parse",
            *command(config, stage=config.stages[-1], num_episodes=num_episodes, cuda=cuda),
        ],
        env=environment(os.environ, cuda=True),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    settings: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return settings


def test_openrlhf_reads_every_setting_as_it_was_meant() -> None:
    got = parsed(CONFIG, cuda=True, num_episodes=3)
    assert got["rollout"]["batch_size"] == 8
    assert got["rollout"]["n_samples_per_prompt"] == 16
    assert got["rollout"]["temperature"] == 0.9
    assert got["rollout"]["max_new_tokens"] == 112
    assert got["rollout"]["vllm_generate_batch_size"] == 8
    assert got["data"]["max_len"] == 64 + 112
    assert got["train"]["batch_size"] == 64  # 8 x 16 samples in 2 updates
    assert got["train"]["num_episodes"] == 3
    assert got["train"]["max_epochs"] == 1
    assert got["train"]["seed"] == 5
    assert got["train"]["max_tokens_per_gpu"] == got["rollout"]["max_tokens_per_gpu"] == 1024
    assert got["actor"]["adam"]["lr"] == 1.5e-4
    assert got["actor"]["lr_scheduler"] == "constant" and got["actor"]["lr_warmup_ratio"] == 0
    assert got["actor"]["eps_clip_low_high"] == [0.2, 0.28]
    assert got["actor"]["num_gpus_per_node"] == got["vllm"]["num_engines"] == 4
    assert got["algo"]["advantage"]["estimator"] == "group_norm"
    assert got["algo"]["advantage"]["is_correction_level"] == "token"
    assert got["algo"]["advantage"]["is_correction_mode"] == "clip"
    assert got["algo"]["kl"]["init_coef"] == 0 and not got["algo"]["kl"]["use_loss"]
    assert got["critic"]["model_name_or_path"] is None
    assert got["ds"]["zero_stage"] == 2 and got["ds"]["param_dtype"] == "bf16"
    assert got["ckpt"]["save_steps"] == 10 and got["ckpt"]["load_enable"] and got["ckpt"]["max_num"] == 3
    paths = (
        got["data"]["prompt_dataset"],
        got["ckpt"]["path"],
        got["ckpt"]["output_dir"],
        got["logger"]["tensorboard_dir"],
    )
    assert all(Path(path).is_relative_to(Path("out").resolve()) for path in paths)
    assert got["actor"]["model_name_or_path"] == str(Path("model").resolve())
    assert got["train"]["agent_func_path"] == str(Path("out/openrlhf/agent.py").resolve())
    assert got["eval"]["dataset"] is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", math.nan),
        ("temperature", 0.0),
        ("clip_low", -3.0),
        ("clip_high", math.inf),
        ("kl_coefficient", -1.0),
        ("seed", -1),
    ],
)
def test_a_number_that_means_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{name} {value:g} is no number"):
        replace(CONFIG, **{name: value})  # type: ignore[arg-type]


def test_a_roll_back_to_saves_that_are_gone_by_then_is_refused() -> None:
    watch = RLWatchConfig(on_repetition="roll_back", window_steps=11)
    with pytest.raises(SettingsError, match="the last 2 saves, every 10 steps, may all be from within"):
        replace(CONFIG, watch=watch)
    assert replace(CONFIG, watch=watch, keep_last_saves=3).watch == watch
    assert replace(CONFIG, watch=replace(watch, window_steps=10)).keep_last_saves == 2


def test_validation_makes_room_for_its_own_length_and_saves_nothing() -> None:
    asked = ValidationConfig(
        sets=(ValidationSet(name="a", prompts=Path("a.jsonl")),),
        every_steps=2,
        samples_per_prompt=2,
        temperature=0.5,
        max_prompt_tokens=100,
        max_response_tokens=200,
    )
    got = parsed(replace(CONFIG, validation=asked), cuda=True)
    assert got["data"]["max_len"] == 300 and got["rollout"]["max_new_tokens"] == 112
    assert parsed(replace(CONFIG, validation=replace(asked, sets=())), cuda=True)["data"]["max_len"] == 64 + 112
    assert (got["eval"]["steps"], got["eval"]["temperature"], got["eval"]["n_samples_per_prompt"]) == (2, 0.5, 2)
    assert got["eval"]["dataset"] == str(Path("out/validation.jsonl").resolve())
    assert got["ckpt"]["best_metric_key"] == "none"


def test_fp16_is_asked_of_the_trainer() -> None:
    assert parsed(replace(CONFIG, precision="fp16"), cuda=True)["ds"]["param_dtype"] == "fp16"


@pytest.mark.parametrize("cuda", [True, False])
def test_only_a_gpu_sleeps_and_uses_nccl(cuda: bool) -> None:
    got = parsed(CONFIG, cuda=cuda)
    assert got["vllm"]["enable_sleep"] is got["ds"]["enable_sleep"] is cuda
    assert got["vllm"]["sync_backend"] == ("nccl" if cuda else "gloo")
    assert got["vllm"]["enforce_eager"] is not cuda
    assert got["train"]["colocate_all"] and got["ds"]["packing_samples"] and got["train"]["dynamic_batch_enable"]


def test_a_kl_penalty_brings_a_reference_model() -> None:
    got = parsed(replace(CONFIG, kl_coefficient=0.01), cuda=True)
    assert got["algo"]["kl"]["init_coef"] == 0.01 and got["algo"]["kl"]["use_loss"]
    assert got["ref"]["num_gpus_per_node"] == 4


def test_nodes_multiply_engines_and_share_the_reference_model() -> None:
    got = parsed(replace(CONFIG, num_nodes=2, kl_coefficient=0.01), cuda=True)
    assert (got["actor"]["num_nodes"], got["actor"]["num_gpus_per_node"], got["vllm"]["num_engines"]) == (2, 4, 8)
    assert (got["ref"]["num_nodes"], got["ref"]["num_gpus_per_node"]) == (2, 4)


def test_samples_that_do_not_divide_by_the_devices_are_refused() -> None:
    with pytest.raises(BadInput, match=r"the 64 samples of an update .* num_nodes 3 x num_gpus 4 = 12 devices"):
        replace(CONFIG, num_nodes=3)


def test_a_flag_that_openrlhf_does_not_know_is_refused() -> None:
    pytest.importorskip("openrlhf", reason="openrlhf is not installed")
    with pytest.raises(BadInput, match=r"OpenRLHF refuses .*--train\.steps"):
        check_command([*command(CONFIG, stage=CONFIG.stages[-1], num_episodes=1, cuda=False), "--train.steps", "3"])


def test_openrlhf_s_own_assertions_are_heard() -> None:
    pytest.importorskip("openrlhf", reason="openrlhf is not installed")
    with pytest.raises(BadInput, match="n_samples_per_prompt > 1"):
        check_command(
            command(replace(CONFIG, samples_per_prompt=1), stage=CONFIG.stages[-1], num_episodes=1, cuda=False)
        )


def test_the_patches_are_on_the_path_without_a_gpu_only() -> None:
    cpu, gpu = (environment({"PYTHONPATH": "/theirs"}, cuda=cuda) for cuda in (False, True))
    assert cpu["PYTHONPATH"].split(os.pathsep)[0] == str(CPU_PATCHES)
    assert str(CPU_PATCHES) not in gpu["PYTHONPATH"]
    assert all(env["PYTHONPATH"].split(os.pathsep)[-1] == "/theirs" for env in (cpu, gpu))
    assert (CPU_PATCHES / "sitecustomize.py").is_file()
    assert "DS_ACCELERATOR" in cpu and "DS_ACCELERATOR" not in gpu
