"""`octo evaluate` as a user types it: help, dry run, bad input. tests/cpu runs vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_octo.cli import evaluate as command
from megatron_octo.errors import BadInput
from tests.conftest import Octo, snapshot, write_model_folder

RECIPE = "recipes/miniature.py:pipeline"
SETTINGS = ("--task", "sums", "--samples", 4, "--temperature", 1)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two problems."""
    path = tmp_path / "problems.jsonl"
    path.write_text('{"input": "Find 1+1.", "label": "2"}\n{"input": "Find 1+2.", "label": "3"}\n')
    return path


@pytest.fixture
def model(runs: Path) -> Path:
    """An export of a run, as far as a dry run looks."""
    folder = runs / "road-decay-long" / "hf" / "step_00000480"
    folder.mkdir(parents=True)
    write_model_folder(folder)
    return folder


def test_help_says_what_it_takes(octo: Octo) -> None:
    shown = octo("evaluate", "--help")
    assert shown.returncode == 0
    for word in ("RECIPE | FOLDER", "--when", "--problems", "--dry-run", "--json", "--overwrite"):
        assert word in shown.stdout


def test_help_of_a_recipe_lists_its_fields(octo: Octo) -> None:
    shown = octo("evaluate", RECIPE, "--when", "before", "--help")
    assert shown.returncode == 0
    assert "--evaluate-before.max-new-tokens" in shown.stdout


def test_dry_run_of_folders_names_outputs_and_changes_nothing(
    octo: Octo, model: Path, problems: Path, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere" / "road" / "hf" / "step_00000480"
    other.mkdir(parents=True)
    write_model_folder(other)
    before = snapshot(tmp_path)
    shown = octo("evaluate", model, other, "--problems", problems, *SETTINGS, "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    scores = tmp_path / "runs" / "scores"
    assert json.loads(shown.stdout) == {
        "problems": 2,
        "models": [
            {
                "model": str(model),
                "output": str(scores / "road-decay-long" / "hf" / "step_00000480" / "sums"),
                "state": "to score",
            },
            {
                "model": str(other),
                "output": str(scores / "road" / "hf" / "step_00000480" / "sums"),
                "state": "to score",
            },
        ],
    }
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no problem file"),
        ('{"input": "x"}', "problems.jsonl:1 has no text in 'label'"),
        ("what is 1+1?", "problems.jsonl:1 is not JSON"),
    ],
)
def test_bad_problem_file_exits_2_with_file_and_line(
    octo: Octo, model: Path, problems: Path, line: str, message: str
) -> None:
    if line:
        problems.write_text(line + "\n")
    else:
        problems.unlink()
    before = snapshot(problems.parent)
    shown = octo("evaluate", model, "--problems", problems, *SETTINGS)
    assert shown.returncode == 2
    assert message in shown.stderr
    assert "fix:" in shown.stderr
    assert snapshot(problems.parent) == before


def test_missing_model_exits_2(octo: Octo, problems: Path, tmp_path: Path) -> None:
    shown = octo("evaluate", tmp_path / "nothing", "--problems", problems, *SETTINGS)
    assert shown.returncode == 2
    assert f"no model in {tmp_path / 'nothing'}" in shown.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["folder"], "folders need --task and --problems"),
        (["folder", RECIPE], "among folders"),
        ([RECIPE, "folder"], "one recipe at a time"),
        ([RECIPE], "is a pipeline, with two evaluations"),
        ([RECIPE, "--when", "before", "--output", "x"], "--output with a recipe"),
        (["folder", "--when", "after"], "--when without a recipe"),
        (["folder", "--task", "t", "--problems", "p", "--samples", "2"], "at temperature 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(runs: Path, argv: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        command.main(argv)


def test_unknown_option_exits_2(octo: Octo) -> None:
    shown = octo("evaluate", "folder", "--tempreature", "1")
    assert shown.returncode == 2
    assert "--tempreature" in shown.stderr


def test_short_options_override_the_recipe(runs: Path) -> None:
    options = command._parser().parse_args([RECIPE, "--when", "after", "--samples", "7", "--max-new-tokens", "9"])
    config = command._from_recipe(options, ["--evaluate-after.seed", "5"])
    assert (config.samples_per_problem, config.max_new_tokens, config.seed) == (7, 9, 5)
    assert [each.output.parent.parent.name for each in config.models] == [
        f"miniature-rl-{branch}" for branch in ("short", "long", "hybrid")
    ]
