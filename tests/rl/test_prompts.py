"""Prompt files: what is refused, and how many of them a run uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_octo.config.rl import RLConfig
from megatron_octo.errors import BadInput
from megatron_octo.rl.prompts import TEMPLATES, Prompt, choose_prompts, plan_prompts, read_prompts, write_prompts

Replaced = Callable[..., RLConfig]
SHARED = "a train leaves the city at noon and travels north at sixty miles an hour"
GOOD = {"input": "first", "label": "1"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2: malformed JSON"),
        ("[1]", "line 2: no column 'input'"),
        ('{"input": "x"}', "line 2: no column 'label'"),
        ('{"input": " ", "label": "1"}', "line 2: input is ' ', not a text"),
        ('{"input": "x", "label": []}', r"line 2: label is \[\], not an answer"),
        ('{"input": "x", "label": "#### "}', "line 2: label is '#### ', not an answer"),
        ('{"input": "first", "label": "2"}', "two labels"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line: str, said: str, config: RLConfig) -> None:
    config.prompts.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(BadInput, match=said):
        read_prompts(config)


def test_a_missing_file_is_refused(tmp_path: Path, replaced: Replaced) -> None:
    with pytest.raises(BadInput, match="no input file"):
        read_prompts(replaced(prompts=tmp_path / "nowhere.jsonl"))


def test_repeated_and_empty_lines_count_once_and_not_at_all(config: RLConfig) -> None:
    config.prompts.write_text(f'{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n{{"input": "b", "label": 2}}\n')
    assert read_prompts(config) == [Prompt("first", "1"), Prompt("b", "2")]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (72, "72"),
        (0.5, "0.5"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("She has 3 + 4 = <<3+4=7>>7 left.\n#### 7", "7"),
        ("So $x = \\boxed{5}$, or rather $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
    ],
)
def test_answers_as_data_sets_write_them(answer: object, label: str, config: RLConfig, replaced: Replaced) -> None:
    config.prompts.write_text(json.dumps({"meta": {"problem": "1+1?"}, "solution": answer}) + "\n")
    named = replaced(question_column="meta.problem", answer_column="solution")
    assert read_prompts(named) == [Prompt("1+1?", label)]


def test_problems_may_be_an_array_or_parquet(tmp_path: Path, config: RLConfig, replaced: Replaced) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"input": f"{n}+{n}?", "label": str(2 * n)} for n in range(3)]
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in ("p.json", "p.parquet"):
        assert [each.label for each in read_prompts(replaced(prompts=tmp_path / name))] == ["0", "2", "4"]


def test_templates_are_the_papers(config: RLConfig, replaced: Replaced) -> None:
    config.prompts.write_text('{"input": "Find {x}.", "label": "1"}\n')
    texts = {name: read_prompts(replaced(template=name))[0].input for name in TEMPLATES}
    assert texts["none"] == "Find {x}."
    assert texts["simple"] == "Question:\nFind {x}.\nAnswer:\n"
    assert texts["user_assistant"] == "User:\nFind {x}.\nAssistant:\n"
    assert texts["complex"].startswith("A conversation between User and Assistant. ")
    assert texts["complex"].endswith(" by the \\boxed{} tag.\nFind {x}.\nAssistant:")
    assert texts["complex"].count("\\boxed{}") == 2


def test_problems_of_evaluation_sets_are_left_out_and_listed(
    tmp_path: Path, config: RLConfig, replaced: Replaced
) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": f"Then {SHARED}. How far?", "answer": 1}) + "\n")
    twelve = " ".join(SHARED.split()[:12])
    with config.prompts.open("a") as file:
        file.write(json.dumps({"input": f"{SHARED.upper().replace(' ', ', ')}!", "label": "1"}) + "\n")
        file.write(json.dumps({"input": f"{twelve} tomorrow", "label": "1"}) + "\n")
    asked = replaced(decontaminate_against=(tmp_path / "test.jsonl",), max_prompt_tokens=100)
    _, report = choose_prompts(asked)
    (hit,) = report.contaminated
    assert hit["prompt"].startswith("A, TRAIN")
    assert (hit["evaluation_set"], hit["words"]) == (str(tmp_path / "test.jsonl"), " ".join(SHARED.split()[:13]))
    assert report.distinct == 22
    assert "1 that share words with evaluation sets; 21 remain" in report.describe(asked)
    assert choose_prompts(config)[1].contaminated == ()


def test_long_prompts_are_left_out_and_counted(config: RLConfig, replaced: Replaced) -> None:
    with config.prompts.open("a") as file:
        file.write(json.dumps({"input": "y" * 65, "label": "1"}) + "\n")
    plan, report = choose_prompts(config)
    assert report.too_long == 1
    assert all(len(prompt.input) <= 64 for prompt in plan.prompts)
    assert choose_prompts(replaced(max_prompt_tokens=65))[1].too_long == 0
    with pytest.raises(BadInput, match="0 usable prompts"):
        choose_prompts(replaced(max_prompt_tokens=2))


def test_one_pass_uses_exactly_the_prompts_of_the_steps(config: RLConfig) -> None:
    plan = plan_prompts(read_prompts(config), config)
    assert plan.num_episodes == 1
    assert len(set(plan.prompts)) == 8  # 2 steps x 4 prompts, of 20


def test_the_seed_alone_chooses_prompts_and_their_order(config: RLConfig, replaced: Replaced) -> None:
    prompts = read_prompts(config)
    assert plan_prompts(prompts, config) == plan_prompts(prompts, replaced(name="other", learning_rate=1.0))
    assert plan_prompts(prompts, config) != plan_prompts(prompts, replaced(seed=7))


def test_more_steps_than_prompts_are_whole_passes(config: RLConfig, replaced: Replaced) -> None:
    plan = plan_prompts(read_prompts(config), replaced(num_steps=15))
    assert (len(plan.prompts), plan.num_episodes) == (20, 3)


def test_steps_that_are_not_whole_passes_are_refused_with_the_nearest_that_are(
    config: RLConfig, replaced: Replaced
) -> None:
    with pytest.raises(BadInput) as refused:
        plan_prompts(read_prompts(config), replaced(num_steps=12))
    assert "20 usable prompts" in refused.value.what and "5 steps a pass" in refused.value.what
    assert "num_steps 10 or 15" in refused.value.fix and "48 prompts" in refused.value.fix


def test_fewer_prompts_than_one_step_are_refused(config: RLConfig, replaced: Replaced) -> None:
    with pytest.raises(BadInput, match="is not one step"):
        plan_prompts(read_prompts(config), replaced(prompts_per_step=32))


def test_a_tokenizer_that_loses_characters_is_refused(config: RLConfig) -> None:
    path = config.model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput, match="gives the prompt"):
        choose_prompts(config)


def test_the_written_file_is_read_back_as_it_was(config: RLConfig, replaced: Replaced, tmp_path: Path) -> None:
    plan = plan_prompts(read_prompts(config), config)
    write_prompts(tmp_path / "out.jsonl", plan)
    assert tuple(read_prompts(replaced(prompts=tmp_path / "out.jsonl"))) == plan.prompts
