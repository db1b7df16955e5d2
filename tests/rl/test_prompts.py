"""Prompt files: what is refused, and how many of them a run uses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.config.rl import RLConfig, ValidationConfig, ValidationSet
from megatron_octo.errors import BadInput, SettingsError
from megatron_octo.rl.decontaminate import Overlaps
from megatron_octo.rl.prompts import (
    TEMPLATES,
    Prompt,
    ValidationPrompt,
    choose_prompts,
    plan_prompts,
    read_prompts,
    write_prompts,
)

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
        read_prompts(config, "none")


def test_a_missing_file_is_refused(tmp_path: Path, replaced: Replaced) -> None:
    with pytest.raises(BadInput, match="no input file"):
        read_prompts(replaced(prompts=tmp_path / "nowhere.jsonl"), "none")


def test_repeated_and_empty_lines_count_once_and_not_at_all(config: RLConfig) -> None:
    config.prompts.write_text(f'{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n{{"input": "b", "label": 2}}\n')
    assert read_prompts(config, "none") == [Prompt("first", "1"), Prompt("b", "2")]


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
    assert read_prompts(named, "none") == [Prompt("1+1?", label)]


def test_problems_may_be_an_array_or_parquet(tmp_path: Path, config: RLConfig, replaced: Replaced) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"input": f"{n}+{n}?", "label": str(2 * n)} for n in range(3)]
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in ("p.json", "p.parquet"):
        assert [each.label for each in read_prompts(replaced(prompts=tmp_path / name), "none")] == ["0", "2", "4"]


def test_templates_are_the_papers(config: RLConfig, replaced: Replaced) -> None:
    config.prompts.write_text('{"input": "Find {x}.", "label": "1"}\n')
    texts = {name: read_prompts(config, name)[0].input for name in TEMPLATES}
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
    assert report.too_short == 20 and "20 of them with fewer than 13 words" in report.describe(asked)
    assert hit["prompt"].startswith("A, TRAIN")
    assert (hit["evaluation_set"], hit["words"]) == (str(tmp_path / "test.jsonl"), " ".join(SHARED.split()[:13]))
    assert report.distinct == 22
    assert "1 that share words with evaluation sets; 21 remain" in report.describe(asked)
    assert choose_prompts(config)[1].contaminated == ()


@pytest.mark.parametrize(
    "record",
    [{"extra": {"question": SHARED}}, {"messages": [{"role": "user", "content": SHARED}]}, [["x", SHARED]], SHARED],
)
def test_an_evaluation_set_s_texts_are_found_however_deep(record: object, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps([record]))
    assert Overlaps.read([tmp_path / "test.json"]).find(SHARED) is not None


@pytest.mark.parametrize("text", ["", '{"problem": "1 + 1?"}\n'])
def test_an_evaluation_set_that_could_leave_out_nothing_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(BadInput, match="has no text of 13 words"):
        Overlaps.read([tmp_path / "test.jsonl"])


def test_a_template_in_an_evaluation_set_is_no_overlap(tmp_path: Path, config: RLConfig, replaced: Replaced) -> None:
    text = TEMPLATES["complex"].format("Find something else altogether.")
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    asked = replaced(
        decontaminate_against=(tmp_path / "test.jsonl",), template="complex", max_prompt_tokens=1_000, num_steps=5
    )
    assert choose_prompts(asked)[1].contaminated == ()


def test_long_prompts_are_left_out_and_counted(config: RLConfig, replaced: Replaced) -> None:
    with config.prompts.open("a") as file:
        file.write(json.dumps({"input": "y" * 65, "label": "1"}) + "\n")
    plan, report = choose_prompts(config)
    assert report.too_long == 1
    assert all(len(prompt.input) <= 64 for prompt in plan.prompts)
    assert choose_prompts(replaced(max_prompt_tokens=65))[1].too_long == 0
    with pytest.raises(BadInput, match="0 usable prompts"):
        choose_prompts(replaced(max_prompt_tokens=2))


def test_problems_with_a_blank_answer_are_left_out_and_counted(config: RLConfig, replaced: Replaced) -> None:
    with config.prompts.open("a") as file:
        file.writelines(json.dumps({"input": f"{n}?", "label": " " * n}) + "\n" for n in range(2))
    each = ValidationSet(name="toy", prompts=config.prompts)
    asked = replaced(num_steps=5, validation=ValidationConfig(sets=(each,)))
    plan, report = choose_prompts(asked)
    assert (report.distinct, report.unanswered, report.too_long) == (22, 2, 0)
    assert (report.validation, report.validation_unanswered, report.validation_too_long) == (20, 2, 0)
    assert all(prompt.label for prompt in plan.prompts) and all(each.label["validation"] for each in plan.validation)
    assert "2 whose answer is blank" in report.describe(asked) and "20 remain; " in report.describe(asked)


def test_one_pass_uses_exactly_the_prompts_of_the_steps(config: RLConfig) -> None:
    plan = plan_prompts(read_prompts(config, "none"), config)
    assert plan.num_episodes == 1
    assert len(set(plan.prompts)) == 8  # 2 steps x 4 prompts, of 20


def test_the_seed_alone_chooses_prompts_and_their_order(config: RLConfig, replaced: Replaced) -> None:
    prompts = read_prompts(config, "none")
    assert plan_prompts(prompts, config) == plan_prompts(prompts, replaced(name="other", learning_rate=1.0))
    assert plan_prompts(prompts, config) != plan_prompts(prompts, replaced(seed=7))


def test_steps_that_are_whole_passes_are_passes(config: RLConfig, replaced: Replaced) -> None:
    plan = plan_prompts(read_prompts(config, "none"), replaced(num_steps=15))
    assert (len(plan.prompts), len(set(plan.prompts)), plan.num_episodes) == (20, 20, 3)


@pytest.mark.parametrize("steps", [11, 12])  # two passes, of five steps and a half; and four prompts more
def test_other_steps_are_one_pass_that_has_each_prompt_equally_often_or_once_more(
    steps: int, replaced: Replaced
) -> None:
    prompts = [Prompt(f"{number}?", str(number)) for number in range(22)]
    plan = plan_prompts(prompts, replaced(num_steps=steps))
    uses = Counter(plan.prompts)
    assert (plan.num_episodes, uses.total()) == (1, 4 * steps)
    assert set(uses) == set(prompts) and set(uses.values()) <= {2, 3}


def test_fewer_prompts_than_one_step_are_refused(config: RLConfig, replaced: Replaced) -> None:
    with pytest.raises(BadInput, match="is not one step"):
        plan_prompts(read_prompts(config, "none"), replaced(prompts_per_step=32))


def test_validation_problems_are_marked_and_long_ones_counted(config: RLConfig, replaced: Replaced) -> None:
    path = config.prompts.with_name("asked.jsonl")
    path.write_text("".join(json.dumps({"q": "x" * n, "a": n}) + "\n" for n in (3, 40)))
    each = ValidationSet(name="AMC", prompts=path, question_column="q", answer_column="a")
    asked = replaced(template="simple", validation=ValidationConfig(sets=(each,), every_steps=1, max_prompt_tokens=30))
    plan, report = choose_prompts(asked)
    expected = ValidationPrompt("Question:\nxxx\nAnswer:\n", {"validation": "3"}, "AMC")
    assert plan.validation == (expected,)
    assert (report.validation, report.validation_too_long) == (1, 1)
    assert "for validation 1, without 0 whose answer is blank and 1 longer than 30 tokens" in report.describe(asked)
    assert "for validation" not in choose_prompts(config)[1].describe(config)
    with pytest.raises(BadInput, match="no problem of the validation sets AMC has an answer and at most 9 tokens"):
        choose_prompts(replace(asked, validation=replace(asked.validation, max_prompt_tokens=9)))


def test_a_validation_set_without_its_columns_is_refused_by_how_they_are_named(
    config: RLConfig, replaced: Replaced
) -> None:
    each = ValidationSet(name="AMC", prompts=config.prompts, question_column="problem")
    with pytest.raises(BadInput, match="problem") as refused:
        choose_prompts(replaced(validation=ValidationConfig(sets=(each,), every_steps=1)))
    assert "--validation.sets" in refused.value.fix and "--question-column" not in refused.value.fix


def test_a_problem_in_two_validation_sets_is_refused(config: RLConfig, replaced: Replaced) -> None:
    sets = tuple(ValidationSet(name=name, prompts=config.prompts) for name in ("a", "b"))
    with pytest.raises(BadInput, match="validation sets a and b share the prompt"):
        choose_prompts(replaced(validation=ValidationConfig(sets=sets, every_steps=1)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"samples_per_prompt": 4}, "samples_per_prompt 4 at temperature 0"),
        ({"temperature": -1.0}, r"validation\.temperature -1 is no number"),
        ({"every_steps": 0}, r"validation\.every_steps 0"),
        ({"sets": (ValidationSet(name="a", prompts=Path("x")),) * 2}, "validation.sets are called a, a"),
    ],
)
def test_a_validation_that_means_nothing_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ValidationConfig(**fields)


def test_a_validation_that_would_never_come_is_refused(config: RLConfig, replaced: Replaced) -> None:
    sets = (ValidationSet(name="a", prompts=config.prompts),)
    with pytest.raises(SettingsError, match="every_steps 3 is beyond num_steps 2"):
        replaced(validation=ValidationConfig(sets=sets, every_steps=3))


def test_the_written_file_is_read_back_as_it_was(config: RLConfig, replaced: Replaced, tmp_path: Path) -> None:
    plan = plan_prompts(read_prompts(config, "none"), config)
    write_prompts(tmp_path / "out.jsonl", plan.prompts)
    assert tuple(read_prompts(replaced(prompts=tmp_path / "out.jsonl"), "none")) == plan.prompts
