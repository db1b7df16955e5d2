"""A benchmark runs on a tiny shape, says what its document quotes, and cleans up; its timings are nobody's here."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.rl import RLConfig
from tests.conftest import REPOSITORY


@pytest.mark.timeout(300)
def test_conversion_is_measured_both_ways_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/convert.py", "--folder", tmp_path, "--shape", "tiny", "--layers", "3", "--json"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["layers"], said["fewer_layers_than_asked"], said["same_bytes"]) == (3, False, True)
    for way in ("from_hf", "to_hf"):
        assert 0.05 < said[way]["peak_gib"] <= said[way]["peak_gib_with_mapped_files"] < 4
        assert said[way]["ratio_to_copy"] > 0
    assert "tensors bit-identical" in done.stderr
    assert not list(tmp_path.iterdir())


def test_conversion_is_measured_with_as_many_layers_as_the_disk_holds(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = runpy.run_path(str(REPOSITORY / "benchmarks/convert.py"))
    whole, that_fits = benchmark["LLAMA_8B"], benchmark["that_fits"]
    assert that_fits(whole, 50_000_000_000) == whole and not capsys.readouterr().err
    assert that_fits(whole, 20_000_000_000).num_layers == 10
    assert capsys.readouterr().err == "10 layers instead of 32: 20 GB are free\n"


def test_a_step_of_rl_is_split_into_shares_of_the_median_step() -> None:
    benchmark = runpy.run_path(str(REPOSITORY / "benchmarks/rl_step.py"))
    config = load_recipe(f"{REPOSITORY}/recipes/miniature.py:rl_long", RLConfig)
    usual = {"rl/experience_s": 1.0, "rl/train_s": 2.0, "rl/sync_s": 0.5, "rl/response_length_mean": 80.0}
    rows = [
        {**usual, "step": step, "rl/generation_s": 6.5 + slow, "rl/step_s": 10.0 + slow, "rl/reward_s": 0.001}
        for step, slow in enumerate((0.0, 0.0, 90.0), start=1)
    ]
    said = benchmark["summary"](config, rows, 0.022)
    assert said["samples_a_step"] == 128
    assert said["share"] == {"generation": 0.65, "experience": 0.1, "update": 0.2, "sync": 0.05}
    assert said["ours_seconds"] == {"reward": 0.128, "follower": 0.022}
    assert said["ours_share"] == 0.015


def test_the_miniature_of_another_seed_has_folders_of_its_own_and_draws_everything_anew(runs: Path) -> None:
    benchmark = runpy.run_path(str(REPOSITORY / "benchmarks/miniature.py"))
    recipe = f"{REPOSITORY}/recipes/miniature.py"
    shipped = tuple(load_recipe(f"{recipe}:{name}", PipelineConfig) for name in ("pipeline", "shuffled_answers"))
    assert benchmark["pipelines"](0) == shipped
    road, control = benchmark["pipelines"](2)
    assert (road.name, control.name) == ("miniature-seed2", "miniature-seed2-shuffled")
    outputs = [road.corpora.output, road.import_folder, *(rl.output for rl in road.rl), control.corpora.output]
    assert all(str(output).startswith(f"{runs}/miniature-seed2") for output in outputs)
    assert {road.corpora.seed, road.base.seed, road.stable.seed, *(rl.seed for rl in road.rl)} == {2}
    assert control.corpora.seed == 2 and control.corpora.shuffle_answers


def test_the_miniature_is_compared_over_seeds_by_paired_changes(runs: Path) -> None:
    benchmark = runpy.run_path(str(REPOSITORY / "benchmarks/miniature.py"))
    seeds = []
    for seed, change in enumerate((0.25, 0.5, 0.75)):
        road, control = benchmark["pipelines"](seed)
        accuracies = {control.branches[0].name: 0.05, road.stable.name: 0.1}
        accuracies |= {stage.name: 0.1 * seed for stage in road.branches}
        accuracies |= {rl.name: 0.1 * seed + change for rl in road.rl}
        for name, accuracy in accuracies.items():
            scores = {"accuracy": accuracy, "accuracy_interval": [0.0, 1.0], "per_problem": [accuracy] * 3}
            rundir.write_json(runs / name / "scores" / "heldout" / "scores.json", scores)
        for rl in road.rl:
            curve = ({"step": 1, "rl/vllm_kl": 1e-5}, {"step": 2, "rl/vllm_kl": -2e-5 * (seed + 1)})
            rundir.write_atomic(rl.output / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in curve))
        seeds.append(benchmark["measured"](road, control))

    assert [each["branch"] for each in seeds[2]["branches"]] == ["decay-short", "decay-long", "decay-hybrid"]
    assert seeds[2]["branches"][0]["times_shuffled"] == 4
    over = benchmark["over_seeds"](seeds)
    assert over["shuffled_answers_accuracy"] == pytest.approx((0.05, 0.05, 0.05))
    long = over["branches"][1]
    # Student's t of two degrees of freedom: 4.3027 standard errors to each side.
    half = 4.3027 * 0.25 / 3**0.5
    assert long["paired_difference"] == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-4)
    assert long["before"][0] == pytest.approx(0.1) and long["after"][0] == pytest.approx(0.6)
    assert long["times_shuffled"] == 2 and long["largest_vllm_kl"] == pytest.approx(6e-5)
