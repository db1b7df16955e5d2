"""The real thing: Ray, DeepSpeed, vLLM and OpenRLHF on a CPU; in the slow tier rolled back, killed and run again."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from megatron_octo import lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.rl import LongerResponses, RLConfig, RLWatchConfig, ValidationConfig, ValidationSet
from megatron_octo.lineage import Lineage
from megatron_octo.rl import saves
from megatron_octo.rl.collect import read_metrics
from megatron_octo.rl.follow import LOG, ROLL_BACKS
from megatron_octo.rl.run import has_gpu
from megatron_octo.rl.watch import MOST_VLLM_KL_CPU
from tests.conftest import REPOSITORY
from tests.rl.conftest import NUM_BOXES, write_tokenizer

for package in ("openrlhf", "ray", "vllm", "deepspeed"):
    if find_spec(package) is None:  # importing them would cost a gigabyte until the last test has ended
        pytest.skip(f"{package} is not installed", allow_module_level=True)
pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(has_gpu(), reason="the tiny model is for machines without a GPU"),
]
LEARNING_RATE = 5e-3  # far enough in two steps for old weights to show in vllm_kl
PROMPTS_PER_STEP = 4
TAG = "OCTO_TEST_RUN"
START_TIMEOUT_S = 600
ENDING_TIMEOUT_S = 180


def write_model(folder: Path) -> None:
    """A Llama of random weights that OpenRLHF and vLLM can run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258 + 2 * NUM_BOXES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 256}))


def start(config: RLConfig, *, healed: Path | None = None) -> subprocess.Popen[str]:
    """Run it as a user does; it leads a process group, and all it starts can be found again (`left`).

    With `healed`, faults are planted, and old weights among them are cured once that file is there.
    """
    path = config.prompts.with_name("config.json")
    rundir.write_json(path, to_dict(config))
    program = ["megatron_octo", "rl", str(path)] if healed is None else ["tests.rl.planted", str(path), str(healed)]
    return subprocess.Popen(
        [sys.executable, "-m", *program],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", TAG: str(config.output)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(config: RLConfig, process: subprocess.Popen[str]) -> str:
    """Wait for its end, which is to be a good one and to leave no process; returns what it said."""
    _, errors = process.communicate(timeout=2 * START_TIMEOUT_S)
    assert process.returncode == 0, errors
    wait_until_gone(config, within_s=20)  # the grading's process takes a moment to see the end of its input
    return errors


def left(config: RLConfig) -> set[int]:
    """Processes that descend from a run of `config`, however they were started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{TAG}={config.output}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def wait_until_gone(config: RLConfig, *, within_s: float) -> None:
    """See that no process of a run is left, or only for so long."""
    deadline = time.monotonic() + within_s
    while left(config) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left(config), "processes of the cluster outlived the run"


def data_state(output: Path, step: int) -> dict[str, Any]:
    """The position in the prompts that the checkpoint of a step holds."""
    import torch

    (path,) = (output / f"openrlhf/_actor/global_step{step}").glob("*model_states.pt")
    state: dict[str, Any] = torch.load(path, weights_only=False)
    return state


def first_prompts(output: Path, log: str) -> list[str]:
    """The prompt of one sample of each step, in the order of the log."""
    known = [json.loads(line)["input"] for line in (output / "prompts.jsonl").read_text().splitlines()]
    samples = [ast.literal_eval(match)[0] for match in re.findall(r"Sample: (\[.*\])", log)]
    return [next(prompt for prompt in known if sample.startswith(prompt)) for sample in samples]


def prompt_steps(output: Path, prompts: Sequence[str]) -> list[int]:
    """The step to which each of these prompts belongs in the order that the last checkpoint holds."""
    import torch

    state = sampler_state(data_state(output, saves.last(output))["data_loader_state_dict"])
    generator = torch.Generator()
    generator.set_state(state["generator"])
    known = [json.loads(line)["input"] for line in (output / "prompts.jsonl").read_text().splitlines()]
    order = torch.randperm(len(known), generator=generator).tolist()
    return [order.index(known.index(prompt)) // PROMPTS_PER_STEP + 1 for prompt in prompts]


@pytest.fixture
def learnable(config: RLConfig) -> RLConfig:
    """A run of three steps, each of them saved, that finds about half of the answers."""
    write_model(config.model)
    lineage.write(config.model, Lineage(name="branch", kind="export", weights_sha256="x"))
    asked = config.prompts.with_name("asked.jsonl")
    for path, count in ((config.prompts, 64), (asked, 6)):
        problems = ({"input": f"Find {number}+{count}.\n", "label": "1"} for number in range(count))
        path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return replace(
        config,
        num_steps=3,
        learning_rate=LEARNING_RATE,
        stop=("1}", "2}"),  # after any box
        validation=ValidationConfig(
            sets=(ValidationSet(name="toy", prompts=asked),),
            every_steps=3,
            samples_per_prompt=2,
            temperature=1.0,
            max_prompt_tokens=64,
            max_response_tokens=2,
        ),
    )


def test_vllm_always_has_the_trained_weights_and_the_end_is_a_model_that_loads(learnable: RLConfig) -> None:
    output = learnable.output
    errors = finish(learnable, start(learnable))

    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(abs(row["rl/vllm_kl"]) < MOST_VLLM_KL_CPU for row in rows)
    assert all(row["optim/grad_norm"] > 0 and row["rl/reward_error_share"] == 0 for row in rows)
    assert all(math.isfinite(row["rl/reward_mean"]) for row in rows)
    assert 0.2 < rows[0]["rl/accuracy"] < 0.8
    # One token in five ends a box. Without stop strings one response in twenty would end before its 16 tokens.
    assert rows[0]["rl/response_length_mean"] < 10 and rows[0]["rl/truncated_share"] < 0.4
    assert ["valid/toy/accuracy" in row for row in rows] == [False, False, True]
    assert 1 <= rows[2]["valid/toy/response_length_mean"] <= 2, "validation has its own length"
    assert 0 <= rows[2]["valid/toy/accuracy"] <= 1
    assert "validation  toy " in errors
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)

    copies = [saves.copy_folder(output, step) for step in saves.copies(output)]
    assert [folder.name for folder in copies] == ["step_00000002", "step_00000003"]
    assert all(map(rundir.is_done, (output, output / "hf", *copies)))
    trained = all_weights_differ(learnable)
    assert trained.generation_config.eos_token_id == 256
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(output / "hf").eos_token == "</s>"

    shown = first_prompts(output, (output / LOG).read_text())
    assert prompt_steps(output, shown) == [1, 2, 3]


@pytest.mark.slow
def test_the_reward_rises_and_longer_responses_begin_at_the_border_with_the_next_prompts(learnable: RLConfig) -> None:
    config = replace(
        learnable,
        num_steps=16,
        save_every_steps=8,
        samples_per_prompt=16,
        stop=(),  # so that responses run up to the longest, past any box
        longer_responses=(LongerResponses(after_step=8, max_response_tokens=24),),
        validation=ValidationConfig(),
        watch=RLWatchConfig(on_repetition="log"),  # it learns to say one thing
    )
    output = config.output
    errors = finish(config, start(config))
    assert "step 8 is saved, and longer responses begin" in errors

    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert all(abs(row["rl/vllm_kl"]) < MOST_VLLM_KL_CPU for row in rows)
    assert -0.4 < rows[0]["rl/reward_mean"] < 0.4, "half of the boxes are right"
    assert fmean(row["rl/reward_mean"] for row in rows[-3:]) > rows[0]["rl/reward_mean"] + 0.5
    lengths = [row["rl/response_length_mean"] for row in rows]
    assert max(lengths[:8]) <= 16 < min(lengths[8:]) <= 24

    # The first OpenRLHF may have begun the step after the border; the second makes it, with the same prompts.
    shown = first_prompts(output, (output / LOG).read_text())
    assert prompt_steps(output, [*shown[:8], *shown[-8:]]) == list(range(1, 17))

    all_weights_differ(config)


@pytest.fixture
def killed(learnable: RLConfig) -> RLConfig:
    """A run with planted faults, rolled back once, and killed with all its process group when its step 3 is saved."""
    config = replace(learnable, num_steps=4, watch=RLWatchConfig(on_stale_weights="roll_back"))
    latest = config.output / "openrlhf/_actor/latest"

    def step_3_is_saved() -> bool:
        rows = read_metrics(config.output / "metrics.jsonl")
        cured = any(row["step"] == 3 and abs(row["rl/vllm_kl"]) < MOST_VLLM_KL_CPU for row in rows)
        return cured and latest.read_text() == "global_step3"

    process = start(config, healed=config.output / ROLL_BACKS)
    deadline = time.monotonic() + 2 * START_TIMEOUT_S
    while not step_3_is_saved():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(config, within_s=ENDING_TIMEOUT_S)  # Ray's agents look for their parent now and then
    assert not rundir.is_done(config.output)
    assert process.stderr is not None and "rolled back to step" in process.stderr.read()
    return config


@pytest.mark.slow
def test_old_weights_are_caught_a_reward_that_raises_poisons_nothing_and_a_killed_run_goes_on(killed: RLConfig) -> None:
    config, output = killed, killed.output
    log_before = (output / LOG).read_text()
    state_before = data_state(output, 3)
    assert "goes on after step 3 of 4" in finish(config, start(config))

    (back,) = rundir.read_json(output / ROLL_BACKS)
    assert back["to"] == back["step"] - 1 and "old weights" in back["what"]

    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(abs(row["rl/vllm_kl"]) < MOST_VLLM_KL_CPU for row in rows), "cured by the roll back"
    assert 0 < max(row["rl/reward_error_share"] for row in rows) < 1 and all(row["optim/grad_norm"] > 0 for row in rows)
    for row in rows:  # a response whose grading failed is a wrong one
        assert row["rl/accuracy"] <= 1 - row["rl/reward_error_share"]
        assert row["rl/reward_mean"] == pytest.approx(2 * row["rl/accuracy"] - 1)
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)

    # A step uses the next four prompts of one permutation, before and after the roll back and the kill.
    state_after = data_state(output, 4)
    assert (state_before["total_consumed_prompts"], state_after["total_consumed_prompts"]) == (12, 16)
    shown = [*first_prompts(output, log_before)[:4], first_prompts(output, (output / LOG).read_text())[-1]]
    assert prompt_steps(output, shown) == [*range(1, back["step"] + 1), *range(back["step"], 5)]

    assert saves.checkpoints(output) == [3, 4]
    best = rundir.read_json(output / "saves/best.json")["step"]
    copies = saves.copies(output)  # the kill may have torn that of step 3
    assert best in copies and copies[-1] == 4 and len(copies) <= 3
    for step in copies:
        link = lineage.read(saves.copy_folder(output, step))
        assert [each.name for each in link.chain()] == ["branch", "test-rl"] and link.step == step
    final, last = (
        rundir.sha256(folder / "model.safetensors") for folder in (output / "hf", saves.copy_folder(output, 4))
    )
    assert final == last


def all_weights_differ(config: RLConfig) -> Any:
    """See that each tensor of a run's end is another than the one it began with; returns the end's model."""
    from transformers import AutoModelForCausalLM

    trained, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (config.output / "hf", config.model))
    weights = dict(before.to(trained.dtype).named_parameters())
    assert all((weights[name] != value).any() for name, value in trained.named_parameters())
    return trained


def sampler_state(state: Any) -> dict[str, Any]:
    """The part of the data loader's state that holds the generator, wherever it is nested."""
    if isinstance(state, dict):
        if "generator" in state and "yielded" in state:
            return state
        for value in state.values():
            if found := sampler_state(value):
                return found
    return {}
