"""Each mistake gets one message with what failed, the value and the fix; exit code 2; nothing on disk changes."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_octo.cli.app import main
from megatron_octo.rundir import mark_done
from tests.conftest import REPOSITORY, Octo, snapshot

STABLE = "recipes/miniature.py:stable"
Refused = Callable[..., str]


@pytest.fixture
def refused(octo: Octo, runs: Path, tmp_path: Path) -> Refused:
    """Run `octo ARGS`; assert that it is refused as bad input ought to be; return the message."""

    def run(*args: object) -> str:
        before = snapshot(tmp_path)
        done = octo(*args)
        message = done.stderr
        assert done.returncode == 2, (done.returncode, message)
        assert "Traceback" not in message
        assert done.stdout == ""
        assert snapshot(tmp_path) == before
        return message

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    """Write the miniature's recipes with a changed stable stage; return the recipe's name."""

    def write(change: str) -> str:
        path = tmp_path / "changed.py"
        text = (REPOSITORY / "recipes" / "miniature.py").read_text()
        path.write_text(f"{text}\n\ndef changed() -> MidTrainConfig:\n    {change}\n")
        return f"{path}:changed"

    return write


def test_an_unknown_recipe_file(refused):
    message = refused("train", "recipes/miniture.py:stable")
    assert "recipes/miniture.py" in message
    assert "did you mean recipes/miniature.py" in message


def test_an_unknown_recipe_function(refused):
    message = refused("train", "recipes/miniature.py:stabel")
    assert "'recipes/miniature.py:stabel'" in message
    assert "did you mean 'stable'" in message


def test_a_recipe_of_another_kind(refused):
    message = refused("train", "recipes/miniature.py:rl_long")
    assert "RLConfig" in message
    assert "stable" in message


def test_a_mistyped_option(refused):
    message = refused("train", STABLE, "--paralel.tensor", "2")
    assert "--paralel.tensor" in message
    assert "--parallel.tensor" in message


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (("train", STABLE, "--rank", "2"), "--ranks"),
        (("pipeline", "recipes/miniature.py", "--dryrun"), "--dry-run"),
        (("rl", "recipes/miniature.py:rl_long", "--dry_run"), "--dry-run"),
        (("data", "prepare", "recipes/miniature.py", "--dry-rn"), "--dry-run"),
    ],
)
def test_a_mistyped_option_of_the_command_itself(refused, command, meant):
    assert f"did you mean {meant}?" in refused(*command)


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (("doctor", "--jsn"), "--json"),
        (("report", "miniature", "--outputt", "x"), "--output"),
        (("data", "inspect", "x", "--documnts", "3"), "--documents"),
        (("convert", "to-hf", "x", "--skip-verif"), "--skip-verify"),
        (("convert", "random-base", "recipes/miniature.py:pipeline", "--overwrit"), "--overwrite"),
        (("recipes", "list", "--jso"), "--json"),
    ],
)
def test_options_are_not_guessed_at(refused, command, meant):
    assert f"did you mean {meant}?" in refused(*command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--branches.0.model.vocab-size", "300"), r"384 exceeds miniature-decay-short's model.vocab_size 300"),
        (("--base.model.vocab-size", "100"), r"miniature-stable and base differ: vocab_size 384 and 100"),
        (("--stable.data.sources.0.path", "nowhere"), r"stable.data.sources.0.path nowhere is not there"),
        (("--branches.1.data.sources.0.path", "nowhere"), r"branches.1.data.sources.0.path nowhere is not there"),
        (("--base-folder", "nowhere"), r"base_folder nowhere is not there"),
        (("--prepare.0.input", "nowhere.jsonl"), r"prepare.0.input nowhere.jsonl is not there"),
        (("--rl.0.prompts", "nowhere"), r"rl.0.prompts nowhere is not there"),
        (("--evaluate-before.problems", "nowhere"), r"evaluate_before.problems nowhere is not there"),
        (("--branches.1.model.hidden-size", "256"), r"differ: hidden_size 128 and 256"),
    ],
)
def test_a_pipeline_whose_stages_do_not_fit_is_refused_before_the_first(refused, options, message):
    assert re.search(message, " ".join(refused("pipeline", "recipes/miniature.py", *options).split()))


def test_a_file_in_the_place_of_a_run_folder(refused, runs):
    runs.mkdir(exist_ok=True)
    (runs / "taken").write_text("")
    assert "is a file, not a run's folder" in refused("train", STABLE, "--name", "taken")


def test_an_option_of_the_wrong_type(refused):
    message = refused("train", STABLE, "--parallel.tensor", "two")
    assert "two" in message


@pytest.mark.parametrize("command", ["train", "pipeline"])
def test_weights_that_do_not_sum_to_1(refused, recipe, command):
    spec = recipe("return replace(stable(), data=_mixture(run_folder(NAME), {'web': 0.6, 'short': 0.3}))")
    if command == "pipeline":
        spec = spec.replace(":changed", "")  # the file's only pipeline
        Path(spec).write_text(Path(spec).read_text().replace('"chat": 0.05}', '"chat": 0.06}'))
    message = refused(command, spec)
    assert "weights sum to" in message
    assert "0.9" in message or "1.01" in message


def test_a_budget_that_is_not_whole_steps(refused):
    message = refused("train", STABLE, "--budget.train-tokens", "1000000")
    assert "1,000,000" in message
    assert "1,000,448" in message  # 977 steps of 1,024 tokens, the nearest


def test_a_layout_that_does_not_divide(refused):
    message = refused("train", STABLE, "--parallel.tensor", "3")
    assert "num_heads 4" in message


def test_a_missing_data_set(refused, runs):
    message = refused("train", STABLE)
    assert str(runs / "miniature" / "data" / "web") in message
    assert "octo data prepare" in message


def test_a_tokenizer_beyond_the_models_vocabulary(refused, prepared):
    message = refused("train", prepared, "--model.vocab-size", "256")
    assert "384" in message
    assert "256" in message


def test_a_run_folder_in_use(refused, prepared, runs):
    folder = runs / "miniature-stable"
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("process 4711 on a-node")
    with (folder / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = refused("train", prepared)
    assert "4711 on a-node" in message
    assert "in use" in message


def test_a_run_folder_with_another_config(refused, prepared, runs, octo):
    folder = runs / "miniature-stable"
    folder.mkdir(parents=True)
    shown = json.loads(octo("recipes", "show", prepared).stdout)
    (folder / "config.json").write_text(json.dumps({**shown, "seed": 99}))
    message = refused("train", prepared)
    assert "seed: 99 in the folder, 0 asked for" in message


def test_a_pipeline_folder_with_another_config(refused, runs, octo):
    folder = runs / "miniature"
    folder.mkdir(parents=True)
    shown = json.loads(octo("recipes", "show", "recipes/miniature.py:pipeline").stdout)
    (folder / "config.json").write_text(json.dumps({**shown, "train_ranks": 7}))
    message = refused("pipeline", "recipes/miniature.py")
    assert "train_ranks: 7 in the folder" in message


@pytest.fixture
def prepared(runs: Path) -> str:
    """The miniature's stable recipe with small prepared data and an import folder that looks whole."""
    overrides = ("--corpora.num-rl-problems", "8", "--corpora.num-heldout-problems", "8")
    small = ["--corpora.documents", *(part for name in ("web", "short", "long", "chat") for part in (name, "300"))]
    for stage in ("generate", "tokenizer", "prepare"):
        assert main(["data", stage, str(REPOSITORY / "recipes" / "miniature.py"), *overrides, *small]) == 0
    folder = runs / "miniature" / "base-megatron"
    folder.mkdir()
    mark_done(folder)
    return STABLE
