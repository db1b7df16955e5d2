"""`octo train`: branches by name and tokens, and the proof of an exact resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.cli.app import main
from megatron_octo.config.base import to_dict
from megatron_octo.train.state import read_state
from tests.finished_runs import write_stable_saves
from tests.prepared import stage, write_cut_off_run, write_data

SAVED = 10


@pytest.fixture
def recipe(runs: Path, tmp_path: Path) -> Path:
    """The settings of a run that was cut off after its save of step 10."""
    write_data(tmp_path / "data")
    config = stage(tmp_path / "data", "run", steps=30)
    write_cut_off_run(config, SAVED)
    rundir.write_json(tmp_path / "recipe.json", to_dict(config))
    return tmp_path / "recipe.json"


@pytest.mark.parametrize("name", ["stable", "decay_long"])
def test_from_makes_a_branch_of_any_recipe(octo, name):
    write_stable_saves("other", 1)
    arguments = ("train", f"recipes/miniature.py:{name}", "--from", "other@1,024", "--start.no-optimizer")
    done = octo(*arguments, "--name", "again", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    wanted = {"kind": "run", "run": "other", "step": None, "tokens": 1024, "optimizer": False}
    assert wanted.items() <= config["start"].items()
    assert config["name"] == "again"


def test_from_without_tokens_is_the_parents_end(octo):
    write_stable_saves("other", 1)
    done = octo("train", "recipes/miniature.py:decay_long", "--from", "other", "--dry-run", "--json")
    start = json.loads(done.stdout)["config"]["start"]
    assert (start["run"], start["step"], start["tokens"]) == ("other", None, None)


def test_from_a_save_that_is_not_there_lists_those_that_are(octo, recipe):
    done = octo("train", recipe, "--name", "branch", "--from", "run@5", "--ranks", "2")
    assert done.returncode == 2
    assert "no save at 5 tokens" in done.stderr
    assert "its saves: 2,560 tokens (step 10)" in done.stderr
    assert "'1B' is no number of tokens" in octo("train", recipe, "--from", "run@1B").stderr


def test_a_dry_run_says_what_a_start_would_say_of_the_parent(octo):
    write_stable_saves("other", 1)
    for parent, told in (
        ("nope", "runs/nope does not exist"),
        ("other@5", "no save at 5 tokens"),
        ("other@", "'' is no number of tokens"),
        ("@1024", "'@1024' names no run"),
    ):
        done = octo("train", "recipes/miniature.py:decay_long", "--from", parent, "--dry-run")
        assert done.returncode == 2
        assert told in done.stderr
    done = octo("train", "recipes/miniature.py:decay_long", "--from", "other", "--model.ffn-size", "96", "--dry-run")
    assert done.returncode == 2
    assert "model.ffn_size" in done.stderr


def test_a_dry_run_and_a_proof_are_not_asked_for_together(octo):
    done = octo("train", "recipes/miniature.py:stable", "--dry-run", "--verify-resume")
    assert done.returncode == 2
    assert "give one of them" in done.stderr


def test_a_resume_is_proven_and_a_shifted_position_is_exit_code_1(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", str(recipe), "--verify-resume", "--batches", "5", "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["holds"]
    assert (proof["first_batch"], proof["last_batch"]) == (11, 15)
    save = rundir.step_folder(rundir.run_folder("run"), SAVED)
    state = read_state(save)
    replace(state, consumed_sequences=state.consumed_sequences + 8).write(save)
    assert main(["train", str(rundir.run_folder("run") / "config.json"), "--verify-resume", "--batches", "5"]) == 1
    said = capsys.readouterr()
    assert "differ from batch 11 on" in said.out
    assert "would not read what an index built afresh says" in said.err
