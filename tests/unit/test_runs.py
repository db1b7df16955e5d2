"""What the run folders say of themselves: state, tokens, what is left, and the tree of their descent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import lineage, rundir
from megatron_octo.cli.runs import main
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.errors import BadInput
from megatron_octo.report.jobs import last_jobs, read_jobs
from megatron_octo.report.runs import find_run, forest, ledger, read_run, read_runs, saves
from megatron_octo.train.state import TrainState
from tests import finished_runs
from tests.conftest import REPOSITORY, snapshot


@pytest.fixture
def pipeline(runs: Path) -> PipelineConfig:
    """The miniature, all of it done."""
    config = finished_runs.pipeline()
    finished_runs.write_runs(config)
    return config


@pytest.fixture
def stable(pipeline: PipelineConfig) -> Path:
    """The folder of its stable stage, cut off after its save of step 780."""
    folder = rundir.run_folder(pipeline.stable.name)
    (folder / rundir.DONE).unlink()
    for step in (390, 780):
        save = rundir.step_folder(folder, step)
        TrainState(step=step, tokens=step * 1024).write(save)
        line = {"name": "web", "planned": 9, "consumed": step}
        rundir.write_json(save / "ledger.json", {"sources": [line]})
        rundir.mark_done(save)
    rundir.step_folder(folder, 1170).mkdir()  # torn
    return folder


def test_done_runs(pipeline):
    states = {run.name: (run.kind, run.state, run.tokens, run.step) for run in read_runs(rundir.runs_root())}
    assert states["miniature-stable"] == ("train", "done", 1_597_440, 1560)
    assert states["miniature-rl-long"] == ("rl", "done", 0, 30)
    assert len(states) == 7


def test_a_run_that_was_cut_off_stands_at_its_last_whole_save(stable):
    run = read_run(stable, {})
    assert run
    assert run.describe() == "stopped at step 780 of 1,560"
    assert run.tokens == 780 * 1024
    assert saves(run) == [{"step": 390, "tokens": 390 * 1024}, {"step": 780, "tokens": 780 * 1024}]
    assert ledger(run) == [{"name": "web", "planned": 9, "consumed": 780}]


def test_a_run_whose_lock_is_held_runs_and_says_how_long_yet(stable):
    rows = [{"step": step, "tokens": step * 1024, "time_s": 2.0 * step} for step in range(1, 1001)]
    finished_runs.write_lines(stable / "metrics.jsonl", rows)
    with (stable / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1001, "tok')
    with rundir.lock(stable):
        run = read_run(stable, {})
    assert run
    assert run.describe() == "running at step 1,000 of 1,560, eta 18m40s"
    assert run.eta_s == pytest.approx(1120)
    assert run.tokens == 1000 * 1024


def test_a_run_that_never_saved(stable):
    shutil.rmtree(stable / "checkpoints")
    run = read_run(stable, {})
    assert run
    assert (run.describe(), run.tokens, saves(run), ledger(run)) == ("not saved yet", 0, [], [])


def test_the_tree_goes_from_the_base_over_stable_and_branches_to_rl(stable, pipeline):
    branch = rundir.run_folder(pipeline.branches[0].name)
    _, _, stage, _, link = lineage.read(branch).chain()
    lineage.write(branch, replace(link, parent=replace(stage, tokens=5)))  # as trained once more; its RL is older
    shutil.rmtree(pipeline.rl[2].output / "hf")  # RL that has written no model yet
    (pipeline.rl[2].output / rundir.DONE).unlink()
    (base,) = forest(read_runs(rundir.runs_root())).items()
    assert base[0] == "random-base (base ba5eba5eba5e)"
    ((_, runs),) = base[1].items()
    ((line, branches),) = runs.items()
    assert line == "miniature-stable  train  stopped at step 780 of 1,560  798,720 tokens"
    assert {line: [each.split("  ")[0] for each in below] for line, below in branches.items()} == {
        "miniature-decay-hybrid  after 1,597,440 tokens  train  done  491,520 tokens": ["miniature-rl-hybrid"],
        "miniature-decay-long  after 1,597,440 tokens  train  done  491,520 tokens": ["miniature-rl-long"],
        "miniature-decay-short  after 5 tokens  train  done  491,520 tokens": ["miniature-rl-short"],
    }


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("lineage.json", '{"name": '),
        ("lineage.json", '{"name": "miniature-stable"}'),
        ("lineage.json", "[]"),
        ("config.json", "{"),
        ("config.json", '"x"'),
    ],
)
def test_a_broken_file_is_told_in_its_runs_line_and_hides_no_other_run(stable, capsys, file, content):
    (stable / file).write_text(content)
    runs = read_runs(rundir.runs_root())
    assert len(runs) == 7
    (broken,) = [run for run in runs if run.state == "broken"]
    assert broken.name == "miniature-stable"
    assert broken.describe().startswith("broken: ")
    assert str(stable) in broken.describe()
    (base,) = forest(runs)
    assert base == "random-base (base ba5eba5eba5e)"  # the branches' own files say where the broken one stands
    for command in ("list", "tree"):
        main([command])
        shown = capsys.readouterr().out
        assert "broken: " in shown
        assert all(run.name in shown for run in runs)


def test_a_run_is_found_by_name_or_folder(pipeline):
    folder = rundir.run_folder("miniature-stable")
    assert find_run("miniature-stable") == find_run(str(folder))
    with pytest.raises(BadInput, match=r"no run 'stable' in .*\n.*miniature-decay-hybrid, "):
        find_run("stable")


def test_nothing_is_written_and_no_torch_is_loaded(pipeline, runs):
    before = snapshot(runs)
    script = (
        "import sys\nfrom megatron_octo.cli.runs import main\n"
        "main(['list', '--json']); main(['tree']); main(['show', 'miniature-rl-long'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron.core', 'pydantic', 'transformers')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.index("\n]") + 2])[0]["name"] == "miniature-decay-hybrid"
    assert snapshot(runs) == before


@pytest.fixture
def squeue(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A program in its place; tests write what it prints."""
    program = runs / "bin" / "squeue"
    program.parent.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    def says(*lines: str) -> None:
        program.write_text("\n".join(("#!/bin/sh", "cat <<END", *lines, "END")))
        program.chmod(0o755)

    return says


def start(runs: Path, job: str, run: Path | None, state: str, command: str | None = "train x") -> None:
    """What a start of a job leaves: no command if it was refused."""
    (runs / "slurm" / job).mkdir(parents=True)
    (runs / "slurm" / job / "job.txt").write_text(f"JobId={job} JobName=job-of-{job}\n   UserId=me\n")
    (runs / "slurm" / job / "state").write_text(f"{state}\n")
    if command:
        (runs / "slurm" / job / "run").write_text(f"{run}\n" if run else "")
        (runs / "slurm" / job / "argv").write_text("".join(f"{word}\n" for word in command.split()))


@pytest.mark.parametrize(
    ("said", "now", "words"),
    [
        ("failed exit code 1: octo train: CUDA error", "", "start 3 failed: exit code 1: octo train: CUDA error"),
        ("stopped by a STOP file", "RUNNING|None", "start 3 stopped: by a STOP file"),
        ("requeued saved in time", "COMPLETING|None", "start 3 requeued: saved in time"),
        ("requeued saved in time", "PENDING|BeginTime", "start 3 requeued: saved in time; waits for BeginTime"),
        ("requeued saved in time", "RUNNING|None", "start 4 running"),
        ("requeued saved in time", "", "start 3 lost: saved in time"),
        ("stopped told to end", "PENDING|None", "start 3 requeued: told to end"),
        ("failed exit code 1", "COMPLETING|None", "start 3 failed: exit code 1"),
        ("resubmitted as job 13: saved in time", "", "start 3 resubmitted: as job 13: saved in time"),
        ("running", "RUNNING|None", "start 3 running"),
        ("running", "PENDING|BadConstraints", "start 3 requeued: waits for BadConstraints"),
        ("running", "", "start 3 lost"),
    ],
)
def test_a_run_is_listed_with_its_last_job(runs, squeue, said, now, words):
    folder = runs / "stable"
    for job, state in (("9.4", "failed earlier"), ("12.0", "requeued"), ("12.2", said)):
        start(runs, job, folder, state)
    squeue(*([f"12|{now}|a|{folder}"] if now else []), "13|RUNNING|None|b|(null)")
    jobs = last_jobs(read_jobs())
    assert jobs[folder].describe() == f"job 12, {words}"
    assert jobs.keys() == {folder}


def test_a_start_that_says_nothing_leaves_the_others_in_the_list(runs, squeue):
    for job, name in (("9.0", "silent"), ("12.0", "stable")):
        start(runs, job, runs / name, "done")
    (runs / "slurm" / "9.0" / "state").unlink()
    squeue()
    said = {run.name: job.describe() for run, job in last_jobs(read_jobs()).items()}
    assert said == {"silent": "job 9 lost", "stable": "job 12 done"}


def test_a_slurm_that_does_not_answer_loses_no_job(runs, squeue):
    start(runs, "12.0", runs / "stable", "running")
    squeue("END", "exit 1", "cat <<END")
    assert last_jobs(read_jobs())[runs / "stable"].describe() == "job 12 running"


def test_jobs_without_a_run_are_listed_after_the_runs(pipeline, runs, squeue, capsys, monkeypatch):
    start(runs, "11.0", None, "failed exit code 2: no checkpoint", "convert to-hf runs/x")
    start(runs, "12.0", None, "done octo convert", "convert to-hf runs/x")
    start(runs, "13.0", None, "requeued its time limit was near", "evaluate runs/x")
    start(runs, "14.0", None, "failed octo slurm: which branch?", None)
    for job in ("11.0", "12.0"):
        (runs / "slurm" / job / "job.txt").write_text("JobId=1 JobName=convert\n")
    squeue(
        "13|PENDING|BeginTime|evaluate-before-RL|(null)",
        f"15|PENDING|Dependency|report|{runs}/slurm",
        "16|PENDING|Priority|of-others|(null)",
        f"17|PENDING|Dependency|report|{runs}/slurm",
    )
    said = {
        "convert": ("convert", "done", "job 12 done: octo convert", "to-hf runs/x"),
        "evaluate-before-RL": (
            "evaluate",
            "requeued",
            "job 13 requeued: its time limit was near; waits for BeginTime",
            "runs/x",
        ),
        "job-of-14.0": ("job", "failed", "job 14 failed: octo slurm: which branch?", ""),
        "report": ("job", "pending", "job 15 pending: Dependency", ""),
    }
    *rows, second = read_runs(runs)
    assert second.describe() == "job 17 pending: Dependency"
    assert [each.name for each in rows[7:]] == list(said)
    assert all((each.kind, each.state, each.describe()) == said[each.name][:3] for each in rows[7:])
    main(["list", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [(each["name"], each["state"]) for each in listed[7:-1]] == [(name, said[name][1]) for name in said]
    assert listed[7]["job"]["argv"] == ["convert", "to-hf", "runs/x"]
    monkeypatch.setenv("COLUMNS", "300")
    main(["list"])
    table = capsys.readouterr().out
    assert all(word in table for words in said.values() for word in words)
    for name in ("convert", "12"):
        main(["show", name])
        assert capsys.readouterr().out.startswith("convert  convert  job 12 done: octo convert")
    main(["show", "11"])
    assert "job 11 failed: exit code 2: no checkpoint" in capsys.readouterr().out
    main(["tree"])
    assert "convert" not in capsys.readouterr().out


def test_records_that_cannot_be_read_hide_no_other_job(runs, squeue):
    for job in ("11.0", "12.0"):
        start(runs, job, None, "done octo convert", "convert to-hf runs/x")
    (runs / "slurm" / "12.0" / "argv").unlink()
    (runs / "slurm" / "12.0" / "argv").mkdir()  # as root nothing else is refused
    (runs / "slurm" / "12.0" / "job.txt").unlink()
    squeue()
    assert [each.name for each in read_runs(runs)] == ["job-of-11.0", "job 12"]


def test_a_run_is_listed_before_its_job_has_begun(pipeline, runs, squeue, capsys):
    start(runs, "12.0", runs / "refused", "failed octo train: unknown setting")
    start(runs, "13.0", runs / "miniature-rl-long", "failed exit code 1")
    squeue(
        f"21|PENDING|Priority|a|{runs}/first",
        f"22|RUNNING|None|b|{runs}/starting",
        f"23|PENDING|Dependency|c|{runs}/miniature-stable",
        f"24|PENDING|Dependency|d|{runs}/miniature-rl-long",
        "25|PENDING|Priority|e|/elsewhere/third",
        "26|PENDING|Priority|f|anything | else",
    )
    (rundir.run_folder("miniature-stable") / rundir.DONE).unlink()
    (rundir.run_folder("miniature-rl-long") / rundir.DONE).unlink()
    said = {run.name: run.describe() for run in read_runs(runs)}
    assert len(said) == 10
    assert said["first"] == "not saved yet; job 21 pending: Priority"
    assert said["starting"] == "not saved yet; job 22 running"
    assert said["refused"] == "not saved yet; job 12 failed: octo train: unknown setting"
    assert said["miniature-stable"].endswith("; job 23 pending: Dependency")
    assert said["miniature-rl-long"].endswith("; job 24 pending: Dependency")
    main(["show", "first"])
    assert "first  not saved yet; job 21 pending: Priority" in " ".join(capsys.readouterr().out.split("  "))
    main(["tree"])
    assert "not saved yet; job 21 pending: Priority" in capsys.readouterr().out
