"""`octo rl`: dry runs, help, bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_octo.rl.preflight import has_gpu
from tests.conftest import Octo, snapshot

pytest.importorskip("openrlhf", reason="openrlhf is not installed")
MINIATURE = "recipes/miniature.py"


def test_a_dry_run_prints_openrlhf_s_command_and_touches_nothing(octo: Octo, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = octo("rl", f"{MINIATURE}:rl_long", "--dry-run", "--learning-rate", "3e-4")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout, comments=True)
    assert words[:3] == ["python", "-m", "openrlhf.cli.train_ppo_ray"]
    assert words[words.index("--actor.adam.lr") + 1] == "0.0003"
    assert words[words.index("--rollout.max_new_tokens") + 1] == "112"
    assert ("no GPU here: this is the command for a CPU" in done.stderr) is not has_gpu()
    assert "no GPU here" not in done.stdout
    assert "not there yet, so model and prompts are not checked" in done.stderr
    assert snapshot(tmp_path) == before


def test_a_dry_run_validates_on_the_sets_that_its_command_line_names(octo: Octo, tmp_path: Path) -> None:
    sets = ("gsm8k.jsonl", f"MATH500={tmp_path}/math.jsonl:problem:answer")
    done = octo("rl", "recipes/rl_zero.py:llama32_3b_short", "--validation.sets", *sets, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)
    words = run["arguments"]
    assert words[words.index("--eval.dataset") + 1] == f"{Path(run['output']).resolve()}/validation.jsonl"
    assert (words[words.index("--eval.steps") + 1], words[words.index("--eval.temperature") + 1]) == ("4", "0.0")
    assert words[words.index("--data.max_len") + 1] == str(1024 + 4096)
    assert f"gsm8k.jsonl, {tmp_path}/math.jsonl" in done.stderr, "both are not there yet"


def test_help_of_a_recipe_lists_its_settings(octo: Octo) -> None:
    done = octo("rl", f"{MINIATURE}:rl_long", "--help")
    assert done.returncode == 0, done.stderr
    assert "--watch.window-steps" in done.stdout and "--validation.sets" in done.stdout


@pytest.mark.parametrize("prompts", ["prompts.jsonl", "prom*.jsonl"])
def test_a_dry_run_checks_what_is_there(octo: Octo, tmp_path: Path, prompts: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.jsonl").touch()
    files = ("--model", str(tmp_path / "model"), "--prompts", str(tmp_path / prompts))
    done = octo("rl", f"{MINIATURE}:rl_long", "--dry-run", *files)
    assert done.returncode == 2
    assert "lacks config.json" in done.stderr


@pytest.mark.parametrize(
    ("args", "address", "said"),
    [
        (("--num-nodes", "2"), "", "names no cluster"),
        ((), "ray://head:10001", "leads to Ray Client"),
        (("--output", "{made}"), "", "was made with other settings"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    octo: Octo, tmp_path: Path, args: tuple[str, ...], address: str, said: str
) -> None:
    (tmp_path / "config.json").write_text('{"name": "another"}')
    filled = (each.format(made=tmp_path) for each in args)
    done = octo("rl", f"{MINIATURE}:rl_long", "--dry-run", *filled, RAY_ADDRESS=address)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_dry_run_names_a_pattern_that_no_file_fits(octo: Octo, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    files = ("--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prom*.jsonl"))
    done = octo("rl", f"{MINIATURE}:rl_long", "--dry-run", *files)
    assert done.returncode == 0
    assert f"not checked: {tmp_path}/prom*.jsonl" in done.stderr


def test_a_pipeline_stands_for_all_its_rl_runs(octo: Octo) -> None:
    done = octo("rl", MINIATURE, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    names = [run["name"] for run in json.loads(done.stdout)]
    assert names == ["miniature-rl-short", "miniature-rl-long", "miniature-rl-hybrid"]


def test_several_recipes_are_several_runs(octo: Octo) -> None:
    done = octo("rl", f"{MINIATURE}:rl_long", f"{MINIATURE}:rl_short", "--dry-run", "--json")
    assert [run["name"] for run in json.loads(done.stdout)] == ["miniature-rl-long", "miniature-rl-short"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((f"{MINIATURE}:rl_lung",), "did you mean 'rl_long'?"),
        ((f"{MINIATURE}:stable",), "is a MidTrainConfig; this command needs a RLConfig or PipelineConfig"),
        ((f"{MINIATURE}:rl_long", f"{MINIATURE}:rl_long"), "two runs would write to"),
        ((f"{MINIATURE}:rl_long", "--zero-stage", "7"), "zero_stage 7 is none of 1, 2 and 3"),
        ((f"{MINIATURE}:rl_long", "--max-tokens-per-gpu", "175"), "may have 176 tokens"),
        (("recipes/rl_zero.py:llama32_3b_long", "--max-response-tokens", "5000"), "4096 after step 100 is below 5000"),
        ((f"{MINIATURE}:rl_long", f"{MINIATURE}:rl_short", "--seed", "3"), "options for 2 recipes at once"),
        ((f"{MINIATURE}:rl_long",), "lacks config.json"),
        ((f"{MINIATURE}:rl_long", "--precision", "fp16", "--dry-run"), "DeepSpeed refuses it on most CPUs"),
        ((f"{MINIATURE}:rl_long", "--lerning-rate", "3"), "lerning-rate"),
        ((), "RECIPE"),
    ],
)
def test_bad_input_ends_with_2_and_says_what(octo: Octo, tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    before = snapshot(tmp_path)
    done = octo("rl", *args)
    assert done.returncode == 2
    assert said in done.stderr + done.stdout
    assert snapshot(tmp_path) == before
