"""Atomic writes, DONE markers, locks, and settings that may not change under a run."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from megatron_octo import rundir
from megatron_octo.errors import BadInput


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), rundir.new_folder(target) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with rundir.new_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert rundir.is_done(target)
    assert (target / "file").read_text() == "whole"


def test_a_failed_second_attempt_keeps_the_first_result(tmp_path):
    target = tmp_path / "out"
    with rundir.new_folder(target) as folder:
        (folder / "file").write_text("first")
    with pytest.raises(RuntimeError), rundir.new_folder(target):
        raise RuntimeError
    assert (target / "file").read_text() == "first"


def test_what_was_killed_and_not_waited_for_yet_is_dead(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as killed:
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays in the process table
        left = tmp_path / f".out.{killed.pid}.tmp"
        left.mkdir()
        rundir.temporary_folder(tmp_path / "out")
        assert not left.exists()


def test_a_new_attempt_clears_what_a_killed_one_left(tmp_path):
    (tmp_path / ".out.999.tmp").mkdir()
    with rundir.new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_moved_away_by_a_killed_attempt_comes_back(tmp_path):
    target, moved = tmp_path / "out", tmp_path / ".out.999999999.old"
    with rundir.new_folder(target) as folder:
        (folder / "file").write_text("first")
    target.replace(moved)  # killed between the two renames
    with pytest.raises(RuntimeError), rundir.new_folder(target):
        raise RuntimeError
    assert (target / "file").read_text() == "first"


def test_a_living_process_keeps_its_temporary_folder(tmp_path):
    other = tmp_path / f".out.{os.getppid()}.tmp"
    other.mkdir()
    with rundir.new_folder(tmp_path / "out"):
        pass
    assert other.exists()


def test_an_atomic_write_leaves_no_temporary_file(tmp_path):
    rundir.write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert rundir.read_json(tmp_path / "a" / "b.json") == {"x": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


def test_a_failed_atomic_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError("full")

    path = tmp_path / "a.json"
    rundir.write_json(path, {"x": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        rundir.write_json(path, {"x": 2})
    assert rundir.read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_refuses_another_process_and_names_the_owner(tmp_path):
    code = (
        f"from megatron_octo import rundir\nfrom pathlib import Path\nwith rundir.lock(Path({str(tmp_path)!r})): pass"
    )
    with rundir.lock(tmp_path):
        assert rundir.in_use(tmp_path)
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert f"process {os.getpid()}" in other.stderr
    assert not rundir.in_use(tmp_path)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_system_without_locks_is_named_and_nothing_on_it_is_in_use(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    (tmp_path / rundir.LOCK).touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(BadInput, match=r"cannot be locked: .*Function not implemented\n  fix: .*OCTO_RUNS"),
        rundir.lock(tmp_path),
    ):
        pass
    assert not rundir.in_use(tmp_path)


def test_a_folder_is_waited_for_until_its_owner_has_ended(tmp_path):
    code = f"""if True:
    import time
    from megatron_octo import rundir
    from pathlib import Path
    with rundir.lock(Path({str(tmp_path)!r})):
        print(flush=True)
        time.sleep(1)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        with pytest.raises(BadInput, match="in use"):
            rundir.wait_until_free(tmp_path, grace_s=0)
        rundir.wait_until_free(tmp_path, grace_s=60)
    assert not rundir.in_use(tmp_path)


def test_differing_settings_are_named(tmp_path):
    rundir.claim(tmp_path, {"a": {"b": 1, "c": [1, 2]}})
    rundir.claim(tmp_path, {"a": {"b": 1, "c": [1, 2]}})
    with pytest.raises(BadInput, match=r"a\.c\.1: 2 in the folder, 3 asked for"):
        rundir.claim(tmp_path, {"a": {"b": 1, "c": [1, 3]}})
    with pytest.raises(BadInput, match="new"):
        rundir.claim(tmp_path, {"a": {"b": 1, "c": [1, 2]}, "new": 5})


def test_json_that_is_torn_or_missing_is_bad_input(tmp_path):
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(BadInput, match=r"torn\.json is not JSON"):
        rundir.read_json(tmp_path / "torn.json")
    with pytest.raises(BadInput, match="no such file"):
        rundir.read_json(tmp_path / "none.json")
    for content in (b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "torn.json").write_bytes(content)
        with pytest.raises(BadInput, match=r"torn\.json is not JSON"):
            rundir.read_json(tmp_path / "torn.json")
    with pytest.raises(BadInput, match=r"cannot be read: Is a directory"):
        rundir.read_json(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(BadInput, match=r"list\.json holds no JSON object: \[1\]"):
        rundir.read_object(tmp_path / "list.json")


def test_the_hash_of_a_folder_changes_with_any_content_or_name(tmp_path):
    (tmp_path / "a.bin").write_text("1")
    first = rundir.sha256_folder(tmp_path, "*.bin")
    (tmp_path / "a.bin").write_text("2")
    second = rundir.sha256_folder(tmp_path, "*.bin")
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    third = rundir.sha256_folder(tmp_path, "*.bin")
    assert len({first, second, third}) == 3


def test_a_file_asks_once(tmp_path):
    path = tmp_path / rundir.STOP
    assert not rundir.take_file(path)
    path.touch()
    assert rundir.take_file(path)
    assert not rundir.take_file(path)
