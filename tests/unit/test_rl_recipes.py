"""The recipes of reinforcement learning: the paper's numbers, and what OpenRLHF is told of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe, read_recipes
from megatron_octo.config.rl import RLConfig, ValidationSet
from megatron_octo.rl.command import command
from megatron_octo.rl.prompts import Prompt, plan_prompts
from tests.conftest import REPOSITORY

FILE = REPOSITORY / "recipes" / "rl_zero.py"
NAMES = sorted(read_recipes(FILE).functions)


def recipe(name: str, *overrides: str) -> RLConfig:
    loaded = load_recipe(f"{FILE}:{name}", (RLConfig,), overrides, command="octo rl")
    assert isinstance(loaded, RLConfig)
    return loaded


def test_each_llama_has_its_three_branches_and_qwen_is_there_to_compare() -> None:
    branches = {f"{model}_{branch}" for model in ("llama32_1b", "llama32_3b", "llama31_8b") for branch in BRANCHES}
    scripts = {f"llama32_3b_{branch}_official_script" for branch in ("long", "hybrid")}
    assert set(NAMES) == branches | {"llama32_3b_base", "qwen25_3b_base"} | scripts


BRANCHES = {
    "short": ("simple", [(200, 4096)]),
    "long": ("complex", [(100, 2048), (160, 4096), (200, 8192)]),
    "hybrid": ("complex", [(200, 4096)]),
}


@pytest.mark.parametrize("model", ["llama32_1b", "llama32_3b", "llama31_8b"])
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_has_the_papers_template_and_lengths(model: str, branch: str) -> None:
    config = recipe(f"{model}_{branch}")
    template, lengths = BRANCHES[branch]
    assert config.template == template
    assert [(stage.end, stage.max_response_tokens) for stage in config.stages] == lengths
    assert config.model.parts[-3:] == (f"{model.replace('_', '-')}-decay-{branch}", "hf", "step_00005000")


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_numbers(name: str) -> None:
    config = recipe(name)
    updates = (256, 16) if name.endswith("official_script") else (128, 2)
    assert (config.prompts_per_step, config.updates_per_step) == updates
    assert (config.samples_per_prompt, config.learning_rate, config.kl_coefficient) == (16, 1e-6, 0.0)
    assert config.stop == ("User:", "Assistant:", "Question:", "Answer:")
    assert (config.temperature, config.max_prompt_tokens, config.clip_low, config.clip_high) == (1.0, 400, 0.2, 0.2)
    assert (
        config.name
        == config.output.name
        == name.replace("_base", "-rl-base")
        .replace("_", "-")
        .replace(*next(((f"-{each}", f"-rl-{each}") for each in BRANCHES if f"_{each}" in name), ("", "")))
    )
    asked = config.validation
    assert (asked.sets, asked.every_steps, asked.temperature, asked.max_prompt_tokens) == ((), 4, 0.0, 1024)
    assert asked.max_response_tokens == config.stages[-1].max_response_tokens
    flags = command(config, stage=config.stages[0], num_episodes=1, cuda=True)
    assert flags[flags.index("--rollout.max_new_tokens") + 1] == str(config.max_response_tokens)
    assert flags[flags.index("--train.batch_size") + 1] == str(128 * 16 // 2 if updates[1] == 2 else 256)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("usable", [8_523, 8_301], ids=["math8k", "decontaminated"])
def test_the_papers_problems_do_for_all_steps(name: str, usable: int) -> None:
    config = recipe(name)
    plan = plan_prompts([Prompt(f"{number}?", str(number)) for number in range(usable)], config)
    assert len(plan.prompts) * plan.num_episodes == config.num_steps * config.prompts_per_step
    assert len(set(plan.prompts)) == usable, "all are used"


def test_names_and_folders_are_distinct() -> None:
    assert len({recipe(name).output for name in NAMES}) == len(NAMES)


MATH500 = ValidationSet(
    name="MATH500", prompts=Path("p/math.jsonl"), question_column="problem", answer_column="extra.answer"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MATH500=p/math.jsonl:problem:extra.answer", MATH500),
        ("p/gsm8k.jsonl.zst", ValidationSet(name="gsm8k", prompts=Path("p/gsm8k.jsonl.zst"))),
        ("p/split=test/amc.parquet", ValidationSet(name="amc", prompts=Path("p/split=test/amc.parquet"))),
        (str(MATH500), MATH500),
    ],
)
def test_a_command_line_names_a_validation_set(text: str, expected: ValidationSet) -> None:
    assert ValidationSet.of(text) == expected
    assert recipe("llama32_3b_long", "--validation.sets", text).validation.sets == (expected,)


def test_validation_sets_of_a_command_line_replace_those_of_the_recipe(tmp_path: Path) -> None:
    named = recipe("llama32_3b_long", "--validation.sets", "a.jsonl", "b.jsonl", "--validation.every-steps", "2")
    assert [each.name for each in named.validation.sets] == ["a", "b"]
    assert (named.validation.every_steps, named.validation.max_response_tokens) == (2, 8192)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(named)))

    def again(*overrides: str) -> RLConfig:
        return load_recipe(str(path), RLConfig, overrides)

    assert again() == named
    assert again("--validation.every-steps", "4").validation.sets == named.validation.sets
    assert again("--validation.sets", "c.jsonl").validation.sets == (ValidationSet.of("c.jsonl"),)
    assert again("--validation.sets").validation.sets == ()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a.jsonl:problem"], "'a.jsonl:problem' is not [NAME=]FILE"),
        (["a=:q:l"], "'a=:q:l' is not"),
        (["a.jsonl::label"], "is not"),
        (["a.jsonl", "b/a.jsonl"], "validation.sets are called a, a"),
    ],
)
def test_a_validation_set_that_is_written_otherwise_is_refused(
    texts: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        recipe("llama32_3b_long", "--validation.sets", *texts)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
