"""Every shipped recipe dry-runs with the command it is for, and a dry run leaves nothing behind."""

from __future__ import annotations

import pytest

from megatron_octo.cli.app import main
from megatron_octo.config.load import recipe_functions
from tests.conftest import REPOSITORY, snapshot

COMMANDS = {
    "MidTrainConfig": "train --ranks 2",
    "RLConfig": "rl",
    "PipelineConfig": "pipeline",
    "EvaluateConfig": "evaluate",
    "PrepareConfig": "data prepare",
}
RECIPES = [
    (COMMANDS[function.__annotations__["return"].__name__], f"{path}:{name}")
    for path in sorted((REPOSITORY / "recipes").glob("*.py"))
    for name, function in recipe_functions(path).items()
    if path.stem != "road"  # reads a base model, which nothing here writes
]


@pytest.mark.parametrize(("command", "recipe"), RECIPES, ids=[recipe.rsplit("/", 1)[-1] for _, recipe in RECIPES])
def test_a_dry_run_says_what_would_happen_and_leaves_nothing(command, recipe, runs, tmp_path, capsys):
    assert main([*command.split(), recipe, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.strip()
    assert not command.startswith("train") or "GiB a GPU at the peak" in said
    assert snapshot(tmp_path) == {}


def test_the_road_at_full_size_names_what_must_be_there(runs, tmp_path, capsys):
    assert main(["pipeline", str(REPOSITORY / "recipes" / "road.py"), "--dry-run"]) == 2
    assert f"base_folder {runs}/hf/llama32-3b is not there" in capsys.readouterr().err
    assert snapshot(tmp_path) == {}
