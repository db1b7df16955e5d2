"""A benchmark runs on a tiny shape, says what its document quotes, and cleans up; its timings are nobody's here."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_octo.config.load import load_recipe
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
