"""`octo report` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

from tests import finished_runs
from tests.conftest import Octo, snapshot

RECIPE = "recipes/miniature.py:pipeline"


def test_help_says_what_it_takes(octo: Octo) -> None:
    shown = octo("report", "--help")
    assert shown.returncode == 0
    for word in ("RECIPE | FOLDER", "--output", "--dry-run", "--json"):
        assert word in shown.stdout


def test_pipeline_that_has_not_run_gets_a_page_that_says_so(octo: Octo, runs: Path) -> None:
    shown = octo("report", RECIPE)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("No branch has been scored yet.")
    page = runs / "miniature" / "report" / "report.html"
    assert f"wrote {page}" in shown.stdout
    assert "Training of stable has not run yet" in page.read_text()


def test_dry_run_writes_nothing(octo: Octo, runs: Path) -> None:
    shown = octo("report", RECIPE, "--dry-run")
    assert shown.returncode == 0
    assert "would write" in shown.stdout
    assert not runs.exists()


def test_runs_by_name_tell_the_verdict_as_json(octo: Octo, runs: Path, tmp_path: Path) -> None:
    config = finished_runs.pipeline()
    finished_runs.write_runs(config)
    names = [config.stable.name, config.branches[0].name, config.rl[0].name]
    shown = octo("report", *names, "--output", tmp_path / "out", "--json")
    assert shown.returncode == 0, shown.stderr
    answer = json.loads(shown.stdout)
    assert answer["html"] == str(tmp_path / "out" / "report.html")
    assert answer["verdict"].startswith("After RL, branch miniature-decay-short is the best reasoner")
    assert answer["verdict"] == json.loads((tmp_path / "out" / "report.json").read_text())["verdict"]


def test_pipeline_is_known_by_its_folder(octo: Octo, runs: Path) -> None:
    from megatron_octo.config.base import to_dict
    from megatron_octo.rundir import write_json

    write_json(runs / "miniature" / "config.json", to_dict(finished_runs.pipeline()))
    assert octo("report", "miniature").returncode == 0
    assert (runs / "miniature" / "report" / "report.html").exists()


def test_unknown_run_exits_2_and_changes_nothing(octo: Octo, runs: Path) -> None:
    runs.mkdir()
    before = snapshot(runs)
    shown = octo("report", "nothing-like-it")
    assert shown.returncode == 2
    assert "no run 'nothing-like-it'" in shown.stderr
    assert "fix:" in shown.stderr
    assert snapshot(runs) == before


def test_folder_that_is_no_run_exits_2(octo: Octo, tmp_path: Path) -> None:
    shown = octo("report", tmp_path)
    assert shown.returncode == 2
    assert "config.json" in shown.stderr
