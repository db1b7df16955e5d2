"""Sums of the files that a conversion reads, taken beside it."""

from __future__ import annotations

import hashlib
import mmap
import random
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.convert import sums as module
from megatron_octo.convert.sums import Sums


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Five files of ten bytes; fifteen are hashed ahead."""
    monkeypatch.setattr(module, "AHEAD_BYTES", 15)
    for name in "bacde":
        (tmp_path / name).write_text(10 * name)
    return [tmp_path / name for name in "abcde"]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were begun, in order."""
    names: list[str] = []
    take = Sums._sum

    def noted(self: Sums, path: Path) -> str:
        names.append(path.name)
        return take(self, path)

    monkeypatch.setattr(Sums, "_sum", noted)
    return names


def test_the_total_is_that_of_the_folder_and_each_file_is_read_once(files: list[Path], begun: list[str]) -> None:
    with Sums(reversed(files)) as sums:
        sums.reach(files[2])
        assert sums.total() == sums.total() == rundir.sha256_folder(files[0].parent, "*")
    assert sorted(begun) == list("abcde")


def test_it_begins_at_once_and_stays_so_far_ahead_of_the_reader(files: list[Path], begun: list[str]) -> None:
    sums = Sums(files)
    sums._pool.shutdown()
    assert begun == ["a", "b"]
    sums = Sums(files)
    sums.reach(files[1])
    sums._pool.shutdown()
    assert begun[2:] == ["a", "b", "c"]


def test_other_files_and_none_are_of_no_concern(files: list[Path], begun: list[str]) -> None:
    with Sums([]) as sums:
        sums.reach(files[0])
    assert begun == []


def test_what_is_not_done_at_the_end_is_left(files: list[Path], begun: list[str]) -> None:
    with Sums(files) as sums:
        sums._left.set()
        assert sums._sum(files[0]) != rundir.sha256(files[0])
    with pytest.raises(RuntimeError):
        sums.total()


@pytest.mark.parametrize("size", [0, 1, mmap.PAGESIZE, 2 * mmap.PAGESIZE, 2 * mmap.PAGESIZE + 1])
def test_a_file_has_the_same_sum_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "HASHED_BYTES", mmap.PAGESIZE)
    monkeypatch.setattr(rundir, "HASHED_BYTES", 1000)
    content = random.Random(0).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert module.sha256(tmp_path / "file") == rundir.sha256(tmp_path / "file") == expected
