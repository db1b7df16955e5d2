"""The front door: help without torch, unknown commands, recipes listed and shown."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from megatron_octo.cli.app import COMMANDS

HEAVY = ("torch", "megatron", "transformers", "vllm", "ray", "tyro", "pydantic", "plotly", "numpy")
HELP_CPU_S = 0.5


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from megatron_octo.cli.app import main; assert main(['--help']) == 0; "
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]; assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert f"  {command} " in done.stdout


def test_help_takes_under_half_a_second_of_cpu_time():
    """The least of three: other work on the machine may slow one down, nothing can speed one up."""

    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "megatron_octo", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)

    assert min(cpu_s() for _ in range(3)) < HELP_CPU_S


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_loads_no_torch_for_it(command):
    code = (
        "import sys\nfrom megatron_octo.cli.app import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: octo {command}" in done.stdout


def test_a_mistyped_command_names_the_nearest(octo):
    done = octo("trian")
    assert done.returncode == 2
    assert "'trian'" in done.stderr
    assert "octo train" in done.stderr


def test_verbose_may_stand_before_the_command_and_shows_where(octo):
    done = octo("-v", "train", "nowhere.py")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "there is no file nowhere.py" in done.stderr


def test_recipes_are_listed_and_shown(octo):
    rows = json.loads(octo("recipes", "list", "--json").stdout)
    listed = {row["recipe"].split(":")[1]: row for row in rows}
    assert {"recipe": "recipes/miniature.py:pipeline", "kind": "PipelineConfig"}.items() <= listed["pipeline"].items()
    assert listed["omi2_40"]["layouts"] == ["h100", "h200", "b200"]
    lines = octo("recipes", "list").stdout.splitlines()
    assert any(
        line.startswith("recipes/llama31_8b.py: Llama-3.1-8B") and "@h100, @h200, @b200" in line for line in lines
    )
    assert not any(line.startswith("recipes/octothinker.py") for line in lines)
    shown = json.loads(octo("recipes", "show", "recipes/miniature.py:decay_long").stdout)
    assert shown["name"] == "miniature-decay-long"


def test_two_recipes_are_compared_field_by_field_and_sources_by_name(octo):
    stable, long = "recipes/llama32_3b.py:stable_200b", "recipes/llama32_3b.py:decay_long"
    assert octo("recipes", "diff", stable, stable).stdout == "no field differs\n"
    rows = {
        row["field"]: (row["old"], row["new"])
        for row in json.loads(octo("recipes", "diff", stable, long, "--json").stdout)
    }
    assert rows["budget.train_tokens"] == (209_715_200_000, 20_971_520_000)
    assert rows["data.sources.dclm-baseline.weight"] == (0.1, 0.05)
    assert rows["data.sources.megamath-qa.weight"] == (0.05, None)
    assert not any(field.startswith("model") for field in rows)
    lines = octo("recipes", "diff", stable, f"{stable}@b200").stdout.split("\n")
    assert [line.split() for line in lines if line] == [
        ["budget.micro_batch_sequences", "1", "->", "2"],
        ["precision.fp8", "tensorwise", "->", "mxfp8"],
    ]


def test_doctor_names_each_part_and_the_fix_for_what_is_missing(octo):
    report = json.loads(octo("doctor", "--json").stdout)
    parts = {part["name"]: part for part in report["parts"]}
    assert {"transformer-engine", "NVIDIA apex", "flash-attn", "GPU", "Slurm", "ray", "vLLM"} <= parts.keys()
    assert all(part["fix"] for part in parts.values() if not part["found"])
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert stages["train"]["runs"], stages["train"]
