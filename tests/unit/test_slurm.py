"""What slurm/*.sh ask of Python: the command of a job, its shape, the health of a node."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.cli import rl as rl_command
from megatron_octo.cli import slurm as command
from megatron_octo.cli.slurm import main
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.errors import BadInput
from megatron_octo.launch import preflight, slurm
from megatron_octo.launch.slurm import Shape, check_logs, check_shape, job, requested, tree
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    """Scripts run in the repository's folder."""
    monkeypatch.chdir(REPOSITORY)


def test_a_script_without_arguments_is_the_3b_model():
    assert job("stable_200b", []).argv == ("train", "recipes/llama32_3b.py:stable_200b")
    assert job("decay_20b", ["long"]).argv == ("train", "recipes/llama32_3b.py:decay_long")
    assert job("rl", ["short"]).argv == ("rl", "recipes/rl_zero.py:llama32_3b_short")


def test_the_rest_of_the_arguments_override_the_recipe(runs: Path):
    found = job("stable_200b", ["--name", "other", "--model", "llama31_8b@h200"])
    assert found.argv == ("train", "recipes/llama31_8b.py:stable_200b@h200", "--name", "other")
    assert found.run == runs / "other"


@pytest.mark.parametrize(
    ("script", "args", "why"),
    [
        ("decay_20b", [], "which branch"),
        ("rl", ["--model", "llama32_3b"], "which branch"),
        ("decay_20b", ["long", "--recipe", "x.py"], "branch long and --recipe x.py"),
        ("stable", [], "no script slurm/stable.sh"),
    ],
)
def test_arguments_that_say_too_little_or_too_much_are_refused(script: str, args: list[str], why: str):
    with pytest.raises(BadInput, match=why):
        job(script, args)


@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_the_recipe_fits_the_papers_allocations(nodes: int):
    config = job("stable_200b", []).config
    assert f"{nodes * 8} ranks" in check_shape(config, Shape(nodes=nodes, gpus_per_node=8))


def test_an_allocation_that_does_not_fit_is_refused_with_numbers_of_nodes_that_do():
    config = job("stable_200b", ["--model", "llama31_8b", "--parallel.tensor", "8", "--parallel.pipeline", "2"]).config
    with pytest.raises(BadInput, match=r"1 nodes x 8 GPUs: 8 ranks do not hold whole copies") as caught:
        check_shape(config, Shape(nodes=1, gpus_per_node=8))
    assert caught.value.fix.startswith("sbatch --nodes=2 or --nodes=4, or ")


def test_rl_needs_its_gpus():
    with pytest.raises(BadInput, match=r"asks for num_nodes 1 x num_gpus 8, and the job has 1 nodes x 4 GPUs"):
        check_shape(job("rl", ["long"]).config, Shape(nodes=1, gpus_per_node=4))


def test_rl_has_as_many_nodes_as_it_asks_for():
    two = job("rl", ["long", "--num-nodes", "2"]).config
    assert "2 x 8 GPUs = 16" in check_shape(two, Shape(nodes=2, gpus_per_node=8))
    for nodes in (1, 3):
        with pytest.raises(BadInput, match=rf"num_nodes 2 x num_gpus 8, and the job has {nodes} nodes") as caught:
            check_shape(two, Shape(nodes=nodes, gpus_per_node=8))
        assert caught.value.fix.startswith("sbatch --nodes=2 --gpus-per-node=8, or --num-nodes ")


STABLE = REPOSITORY / "slurm" / "stable_200b.sh"


def test_a_plan_of_rl_on_several_nodes_knows_that_they_will_be_one_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")  # undone at the end
    monkeypatch.delenv("RAY_ADDRESS")
    words = ["--recipe", "recipes/miniature.py:rl_long", "--num-nodes", "2"]
    main(["plan", "--nodes", "2", "--gpus-per-node", "1", "--records", str(tmp_path), "rl", *words])
    assert (tmp_path / "argv").read_text().startswith("rl\n")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(BadInput, match="RAY_ADDRESS names no cluster"):
        rl_command.main([*words[1:], "--dry-run"])


def test_options_go_before_directives():
    assert requested([], STABLE).shape == Shape(nodes=8, gpus_per_node=8)
    assert requested(["-N", "2", "--gpus-per-node=h100:4", "-p", "x"], STABLE).shape == Shape(nodes=2, gpus_per_node=4)
    with pytest.raises(BadInput, match="not two numbers"):
        requested(["--nodes=2-4"], STABLE)


def test_variables_of_sbatch_go_before_directives_and_options_before_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "h100:3")
    monkeypatch.setenv("SBATCH_NODES", "2")  # sbatch knows no such variable
    assert requested([], STABLE).shape == Shape(nodes=8, gpus_per_node=3)
    assert requested(["--gpus-per-node=4"], STABLE).shape == Shape(nodes=8, gpus_per_node=4)


@pytest.mark.parametrize(("variable", "value"), [("SBATCH_TIMELIMIT", "4"), ("SBATCH_SIGNAL", "B:USR1@90000")])
def test_a_variable_by_which_the_time_limit_is_over_before_the_signal_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, match=rf"as soon as it starts; the environment has {variable}={value}"):
        requested([], STABLE)
    requested(["--time=1-0", "--signal=B:USR1@900"], STABLE)
    with pytest.raises(BadInput, match=rf"as soon as it starts; the environment has {variable}={value}"):
        main(["tree", "--", "--time=1-0", "--signal=B:USR1@900", "recipes/road.py:llama32_3b"])  # RL gets no options


@pytest.mark.parametrize(
    ("options", "environment", "logs"),
    [
        ([], {}, ["slurm/logs"]),
        ([], {"SBATCH_OUTPUT": "/a/%x/%j.out", "SBATCH_ERROR": "b/%j.err"}, ["/a", "b"]),
        (["-o", "%j.out", "--error=/dev/null"], {"SBATCH_OUTPUT": "/a/x"}, ["."]),
    ],
)
def test_the_folders_of_what_slurm_writes_are_those_of_options_variables_and_directives(
    monkeypatch, options, environment, logs
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [str(each) for each in requested(options, STABLE).logs] == logs


def test_a_folder_that_slurm_would_write_to_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SBATCH_OUTPUT", f"{tmp_path}/gone/%j.out")
    with pytest.raises(BadInput, match=f"log folder {tmp_path}/gone cannot be written"):
        main(["check", "--", "slurm/stable_200b.sh"])
    (tmp_path / "gone").mkdir()
    main(["check", "--", "slurm/stable_200b.sh"])


@pytest.mark.parametrize("time", ["15", "10:00", "15:00", "0:15:00", "0-0:15", "00:14:59"])
def test_a_time_limit_that_is_over_before_its_signal_is_refused(time: str):
    with pytest.raises(BadInput, match="asked to end as soon as it starts") as caught:
        requested([f"--time={time}"], STABLE)
    assert "well above 900 s" in caught.value.fix


@pytest.mark.parametrize("words", [["-t", "16"], ["-t15:01"], ["--time=1-0"], ["--time=UNLIMITED"], ["--time=0"]])
def test_other_time_limits_are_not(words: list[str]):
    assert requested(words, STABLE).shape.nodes == 8
    assert requested(["--time=15", "--signal=B:USR1@300"], STABLE).shape.nodes == 8


def test_runs_that_have_a_job_are_not_submitted_again(tmp_path: Path, runs: Path, monkeypatch, capsys):
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    words = ["tree", "--", "--nodes=1", "--gpus-per-node=1", "recipes/miniature.py:pipeline"]
    for folder, fails in ((runs / "miniature-stable", True), (runs / "another", False)):
        squeue.write_text(f"#!/bin/sh\necho '7|PENDING|Priority|a|{folder}'\n")
        squeue.chmod(0o755)
        with pytest.raises(BadInput, match=r"of these runs: 7\n") if fails else contextlib.nullcontext():
            main(words)
        assert bool(capsys.readouterr().out) != fails


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["evaluate.sh", "runs/x", "--nonsense"], "--nonsense"),
        (["convert.sh"], "required: from-hf"),
        (["prepare_data.sh", "prepaer"], "prepaer"),
        (["report.sh"], "RECIPE | FOLDER"),
    ],
)
def test_arguments_that_a_command_does_not_take_are_refused_before_submission(words: list[str], why: str, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["check", "--", f"slurm/{words[0]}", *words[1:]])
    assert caught.value.code == 2
    assert why in capsys.readouterr().err


def test_what_a_command_reads_need_not_be_there_before_submission(capsys):
    for words in ("evaluate.sh runs/x --task t --problems x.jsonl", "convert.sh to-hf runs/x", "report.sh runs/x"):
        main(["check", "--", *f"slurm/{words}".split()])


def test_a_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch):
    check_logs()
    monkeypatch.setattr(slurm.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(BadInput, match="0 bytes are left on its disk"):
        check_logs()


def test_a_read_only_log_folder_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm.os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="log folder slurm/logs cannot be written"):
        check_logs()


def test_a_pipeline_is_a_tree_of_jobs():
    config = load_recipe("recipes/road.py:llama32_3b", PipelineConfig)
    jobs = {each.name: each for each in tree(config)}
    branches = [branch.name for branch in config.branches]
    assert jobs["train llama32-3b-stable-200b"].after == ("import base",)
    for branch, rl in zip(branches, config.rl, strict=True):
        assert jobs[f"train {branch}"].after == ("train llama32-3b-stable-200b",)
        assert jobs[f"export {branch}"].after == (f"train {branch}",)
        shape = Shape(nodes=rl.num_nodes, gpus_per_node=rl.num_gpus)
        assert (jobs[rl.name].after, jobs[rl.name].shape) == ((f"export {branch}",), shape)
        assert check_shape(rl, shape)
    assert jobs["evaluate before RL"].after == tuple(f"export {name}" for name in ("llama32-3b-stable-200b", *branches))
    assert jobs["evaluate after RL"].after == tuple(rl.name for rl in config.rl)
    assert jobs["report"].after == ("evaluate before RL", "evaluate after RL")
    for each in jobs.values():
        assert (REPOSITORY / "slurm" / f"{each.script}.sh").exists()


def test_nothing_waits_for_a_job_that_is_done():
    config = load_recipe("recipes/road.py:llama32_3b", PipelineConfig)
    for name in ("base/llama32-3b", config.stable.name):
        rundir.mark_done(rundir.run_folder(name))
    jobs = {each.name: each for each in tree(config)}
    assert "import base" not in jobs
    assert f"train {config.stable.name}" not in jobs
    assert jobs["train llama32-3b-decay-long"].after == ()


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in its place; tests write what it prints."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ("0, 4, 0\n1, 4, [N/A]", []),
        ("0, 4, 0", ["1 of 2 GPUs"]),
        ("0, 4, 0\n1, 70000, 0", ["GPU 1: 70,000 MiB are in use"]),
        ("0, 4, 3\n1, 4, 0", ["GPU 0: 3 uncorrected memory errors"]),
        ("No devices were found", ["nvidia-smi does not answer: "]),
    ],
)
def test_a_gpu_that_is_missing_in_use_or_broken_is_found(nvidia_smi: Path, tmp_path: Path, rows: str, found: list[str]):
    nvidia_smi.write_text(f"#!/bin/sh\necho '{rows}'\n")
    nvidia_smi.chmod(0o755)
    said = preflight.faults(num_gpus=2, runs=tmp_path)
    assert len(said) == len(found)
    assert all(each.startswith(start) for each, start in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("field", "values", "found"),
    [
        ("gpu_recovery_action", "None None", []),
        ("gpu_recovery_action", "None Reset", ["GPU 1: gpu_recovery_action is Reset: "]),
        ("remapped_rows.pending", "No Yes", ["GPU 1: remapped_rows.pending is Yes: "]),
        ("remapped_rows.failure", "1 0", ["GPU 0: remapped_rows.failure is 1: "]),
        ("remapped_rows.failure", "[N/A] [Not Supported]", []),
    ],
)
def test_what_an_error_left_on_a_gpu_is_found_where_the_driver_tells(nvidia_smi: Path, tmp_path, field, values, found):
    first, second = values.split(maxsplit=1)
    nvidia_smi.write_text(
        "#!/bin/sh\n"
        f"case $1 in *=index,memory.used,*) echo '0, 4, 0'; echo '1, 4, 0';;\n"
        f"*=index,{field}) echo '0, {first}'; echo '1, {second}';;\n"
        "*=driver_version) echo 580.95.05; echo 580.95.05;;\n"
        '*) echo "Field $1 is not a valid field to query."; exit 2;; esac\n'
    )
    nvidia_smi.chmod(0o755)
    said = preflight.faults(num_gpus=2, runs=tmp_path)
    assert len(said) == len(found) and all(map(str.startswith, said, found))
    assert preflight.driver() == "580.95.05"


def test_an_export_in_a_tree_names_the_last_save_of_its_run():
    config = load_recipe("recipes/road.py:llama32_3b", PipelineConfig)
    for stage in (config.stable, *config.branches):
        (export,) = (each for each in tree(config) if each.name == f"export {stage.name}")
        save = rundir.step_folder(rundir.run_folder(stage.name), stage.num_steps)
        assert export.args[:2] == ("to-hf", str(save)), "a stopped run's newest save is an earlier one"


@pytest.mark.parametrize("site", sorted((REPOSITORY / "slurm" / "sites").glob("*.sh")), ids=lambda path: path.stem)
@pytest.mark.parametrize(("bandwidth", "fault"), [("480.2", ""), ("41.5", "41.5 GB/s"), (None, "0 GB/s")])
def test_the_example_of_a_bandwidth_check_finds_slow_nodes(nvidia_smi, tmp_path, site, bandwidth, fault):
    (line,) = re.findall(r"^# (OCTO_PREFLIGHT=.*)$", site.read_text(), re.MULTILINE)
    command = subprocess.check_output(["bash", "-c", f'{line}; echo -n "$OCTO_PREFLIGHT"'], text=True)
    if bandwidth:
        program = nvidia_smi.with_name("all_reduce_perf")
        program.write_text(f"#!/bin/sh\necho '# Avg bus bandwidth    : {bandwidth}'\necho '#'\n")
        program.chmod(0o755)
    found = preflight.faults(num_gpus=0, runs=tmp_path, command=command)
    assert len(found) == bool(fault)
    assert all(each.startswith(f"{command!r} ended with exit code 1") for each in found)


def test_a_disk_and_a_command_of_the_site_are_checked(tmp_path: Path):
    (tmp_path / "file").touch()
    assert preflight.faults(num_gpus=0, runs=tmp_path, command="true") == []
    disk = preflight.faults(num_gpus=0, runs=tmp_path / "file" / "runs")
    command = preflight.faults(num_gpus=0, runs=tmp_path, command="echo broken fabric; exit 7")
    assert disk == [f"{tmp_path}/file/runs cannot be written: Not a directory"]
    assert command == ["'echo broken fabric; exit 7' ended with exit code 7 broken fabric"]


def test_the_first_node_of_rl_is_met_where_others_reach_it(monkeypatch):
    monkeypatch.setattr(command.socket, "gethostbyname", {"alone": "127.0.1.1", "far": "10.1.2.3"}.get)
    assert command._address("far", "127.0.0.1") == "10.1.2.3"
    assert command._address("alone", "") == "127.0.1.1"
    assert command._address("alone", "127.0.0.1") == "127.0.0.1"
