"""The commands that README and docs show do run: `octo` ones as they stand or dry, `make` targets exist."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from tests.conftest import REPOSITORY, Octo
from tests.finished_runs import write_stable_saves

READ_ONLY = ("doctor", "recipes", "runs")
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


LINK = re.compile(r"\]\(([\w./]+)\)")


def shell_lines() -> list[str]:
    """Every line of a `sh` block, its comment cut off."""
    blocks = (block for path in DOCUMENTS for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL))
    lines = (line.split("  #")[0].strip() for block in blocks for line in block.splitlines())
    return sorted({line for line in lines if line and not line.startswith("#")})


OCTO = [line for line in shell_lines() if line.startswith("octo ")]
MAKE = [line for line in shell_lines() if line.startswith("make ")]


def test_the_readme_shows_its_two_commands_and_some_of_octo():
    assert {"make demo", "make test"} <= set(MAKE)
    assert len(OCTO) >= 5


@pytest.mark.parametrize("line", OCTO)
def test_an_octo_command_of_the_documents_runs(line, octo: Octo):
    args = [arg for arg in shlex.split(line)[1:] if arg != "--verify-resume"]  # which needs a run with its data
    write_stable_saves("miniature-stable", 1170, 1560)
    if args[0] not in READ_ONLY and "--dry-run" not in args:
        args.append("--dry-run")
    done = octo(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", MAKE)
def test_a_make_target_of_the_documents_exists(line):
    done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=REPOSITORY, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_that_the_documents_name_exist():
    named = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"`((?:tests|docs|recipes|requirements|tools|benchmarks)/[\w./]+)`", path.read_text())
    }
    for path in DOCUMENTS:
        assert not re.findall(r"@[A-Z]+@", path.read_text())
        named |= {str((path.parent / name).relative_to(REPOSITORY)) for name in LINK.findall(path.read_text())}
    missing = [name for name in sorted(named) if not (REPOSITORY / name).exists()]
    assert not missing
