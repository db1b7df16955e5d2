"""Checksums of a folder: as sha256sum writes them, and any changed byte is found."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_octo import checksums, rundir


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed folder of three files."""
    for name in ("a.bin", ".hidden", "c with a space"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    checksums.seal(tmp_path, {"a.bin": hashlib.sha256(b"a.bin" * 9).hexdigest()})
    return tmp_path


def test_a_sealed_folder_has_no_faults_and_satisfies_sha256sum(folder):
    assert rundir.is_done(folder)
    assert checksums.faults(folder) == []
    command = shutil.which("sha256sum")
    if command is None:
        pytest.skip("sha256sum is not installed")
    subprocess.run([command, "--check", "--strict", checksums.FILE], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def test_a_checksum_that_is_known_is_not_computed_again(folder, monkeypatch):
    read = []
    monkeypatch.setattr(checksums, "sha256", lambda path: read.append(path.name) or "0" * 64)
    (folder / checksums.FILE).unlink()
    (folder / rundir.DONE).unlink()
    checksums.seal(folder, {"a.bin": "1" * 64})
    assert read == [".hidden", "c with a space"]


def test_every_changed_byte_is_found(folder):
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for offset in range(len(whole)):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
            assert checksums.faults(folder), (path, offset)
            path.write_bytes(whole[:offset])
            assert checksums.faults(folder), (path, offset)
        path.write_bytes(whole)
    assert checksums.faults(folder) == []


def test_the_fault_names_the_file(folder):
    (folder / "a.bin").unlink()
    (folder / ".hidden").write_bytes(b"")
    assert checksums.faults(folder) == [
        ".hidden is not as it was written: its checksum differs",
        "a.bin cannot be read: No such file or directory",
    ]


def test_a_folder_that_is_not_sealed_is_at_fault(folder):
    (folder / checksums.FILE).unlink()
    assert checksums.faults(folder) == ["it has no SHA256SUMS"]
    (folder / rundir.DONE).unlink()
    assert checksums.faults(folder) == ["it has no DONE"]


def test_parts_together_read_every_file_once(folder):
    for path in folder.iterdir():
        if path.name not in (rundir.DONE, checksums.FILE):
            path.write_bytes(b"")
    parts = [checksums.faults(folder, part=part, parts=2) for part in range(2)]
    assert [len(part) for part in parts] == [2, 1]
    assert sorted(parts[0] + parts[1]) == checksums.faults(folder)
