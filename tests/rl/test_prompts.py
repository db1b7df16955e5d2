"""Prompt files: what is refused, and how many of them a run uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_octo.config.rl import RLConfig
from megatron_octo.errors import BadInput
from megatron_octo.rl.prompts import Prompt, check_prompts, plan_prompts, read_prompts, write_prompts

Replaced = Callable[..., RLConfig]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2 is not JSON"),
        ("[1]", "line 2 lacks"),
        ('{"input": "x"}', "line 2 lacks"),
        ('{"input": "", "label": "1"}', "line 2 lacks"),
        ('{"input": "x", "label": 1}', "line 2 lacks"),
        ('{"input": "first", "label": "2"}', "two labels"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"input": "first", "label": "1"}) + "\n" + line + "\n")
    with pytest.raises(BadInput, match=said):
        read_prompts(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no prompt file"):
        read_prompts(tmp_path / "nowhere.jsonl")


def test_repeated_and_empty_lines_count_once_and_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input": "a", "label": "1"}\n\n{"input": "a", "label": "1"}\n{"input": "b", "label": "2"}\n')
    assert read_prompts(path) == [Prompt("a", "1"), Prompt("b", "2")]


def test_one_pass_uses_exactly_the_prompts_of_the_steps(config: RLConfig) -> None:
    plan = plan_prompts(read_prompts(config.prompts), config)
    assert plan.num_episodes == 1
    assert len(set(plan.prompts)) == 8  # 2 steps x 4 prompts, of 20


def test_the_seed_alone_chooses_prompts_and_their_order(config: RLConfig, replaced: Replaced) -> None:
    prompts = read_prompts(config.prompts)
    assert plan_prompts(prompts, config) == plan_prompts(prompts, replaced(name="other", learning_rate=1.0))
    assert plan_prompts(prompts, config) != plan_prompts(prompts, replaced(seed=7))


def test_more_steps_than_prompts_are_whole_passes(config: RLConfig, replaced: Replaced) -> None:
    plan = plan_prompts(read_prompts(config.prompts), replaced(num_steps=15))
    assert (len(plan.prompts), plan.num_episodes) == (20, 3)


def test_steps_that_are_not_whole_passes_are_refused_with_the_nearest_that_are(
    config: RLConfig, replaced: Replaced
) -> None:
    with pytest.raises(BadInput) as refused:
        plan_prompts(read_prompts(config.prompts), replaced(num_steps=12))
    assert "20 distinct prompts" in refused.value.what and "5 steps a pass" in refused.value.what
    assert "num_steps 10 or 15" in refused.value.fix and "48 prompts" in refused.value.fix


def test_fewer_prompts_than_one_step_are_refused(config: RLConfig, replaced: Replaced) -> None:
    with pytest.raises(BadInput, match="is not one step"):
        plan_prompts(read_prompts(config.prompts), replaced(prompts_per_step=32))


def test_a_prompt_beyond_max_prompt_tokens_is_refused_with_its_length(config: RLConfig, replaced: Replaced) -> None:
    prompts = [Prompt("x" * 10, "1"), Prompt("y" * 65, "1")]
    with pytest.raises(
        BadInput, match=r"1 of 2 prompts .* longer than max_prompt_tokens 64; the longest has 65 tokens"
    ):
        check_prompts(prompts, config)
    check_prompts(prompts, replaced(max_prompt_tokens=65))


def test_a_tokenizer_that_loses_characters_is_refused(config: RLConfig) -> None:
    path = config.model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput, match="gives the prompt"):
        check_prompts([Prompt("Question", "1")], config)


def test_the_written_file_is_read_back_as_it_was(config: RLConfig, tmp_path: Path) -> None:
    plan = plan_prompts(read_prompts(config.prompts), config)
    write_prompts(tmp_path / "out.jsonl", plan)
    assert tuple(read_prompts(tmp_path / "out.jsonl")) == plan.prompts
