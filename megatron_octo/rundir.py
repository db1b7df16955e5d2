"""Names, atomic writes and locks of everything that a stage leaves on disk.

A stage writes a folder. `DONE` in it, written last, says that the folder is whole; a stage whose
folder has one is skipped. A run folder also holds `config.json`, and a second process, or another
config, is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_octo.errors import BadInput

DONE = "DONE"
LOCK = ".lock"
STOP, SAVE = "STOP", "SAVE"
"""Files that people leave in a run's folder, to ask for a save and the end, or for a save."""
HASHED_BYTES = 8 << 20
"""Hashed at once: between two of them a thread waits for all others that run Python, up to 5 ms for each."""


def runs_root() -> Path:
    """The folder that all runs live in: `OCTO_RUNS`, or `runs` in the current folder."""
    return Path(os.environ.get("OCTO_RUNS", "runs"))


def take_file(path: Path) -> bool:
    """Whether someone left the file `path`; it is removed, so that it asks once."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def run_folder(name: str) -> Path:
    """The folder of the run called `name`."""
    return runs_root() / name


def step_folder(run: Path, step: int) -> Path:
    """The folder of the save after optimizer step `step` of a run."""
    return run / "checkpoints" / f"step_{step:08d}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or torn one is the user's to mend.

    Raises:
        BadInput: `path` is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"no such file: {path}", fix="check the path, or run the stage that writes it") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}", fix="give a file that can be read") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, or brackets without an end
        raise BadInput(f"{path} is not JSON: {error}", fix="delete it and run the stage that writes it") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds names and values.

    Raises:
        BadInput: `path` is missing, cannot be read or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds no JSON object: {str(value)[:40]}", fix="take the file from where it was made")
    return value


def free_bytes(folder: Path) -> int:
    """Room on the disk that `folder`, which need not be there yet, lies or will lie on."""
    return shutil.disk_usage(next(each for each in folder.absolute().parents if each.exists())).free


def is_done(folder: Path) -> bool:
    """Whether the stage that writes `folder` finished."""
    return (folder / DONE).exists()


def mark_done(folder: Path, note: str = "") -> None:
    """Say that `folder` is whole. Call it last."""
    write_atomic(folder / DONE, note + "\n" if note else "")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, marked DONE, when the block ends without an error.

    What an earlier, interrupted attempt left beside it is removed first. An existing `path` is
    replaced only at the end, so a failure loses nothing.
    """
    temporary = temporary_folder(path)
    try:
        yield temporary
        mark_done(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish(temporary, path)


def temporary_folder(path: Path) -> Path:
    """Make an empty folder for what is to be `path`; what killed attempts at `path` left goes first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Give a whole `temporary_folder(path)` its name."""
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old)
    else:
        temporary.replace(path)
    _sync_folder(path.parent)


def clear_stale(path: Path) -> None:
    """Remove what killed attempts at `path` left, but first put back a result that one had just moved away."""
    for old in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.replace(path)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        if not _lives(stale.name.split(".")[-2]):
            shutil.rmtree(stale, ignore_errors=True)


def _lives(pid: str) -> bool:
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"  # dead, but nobody has waited for it yet


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Own `folder` for the block; the operating system lets go when the process dies.

    Raises:
        BadInput: another process owns it, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _owned(folder) from None
        except OSError as error:
            raise BadInput(
                f"run folder {folder} cannot be locked: {error}",
                fix="mount its file system with locks (Lustre: -o flock), or let OCTO_RUNS name a folder on one that "
                "has them",
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def in_use(folder: Path) -> bool:
    """Whether some process owns `folder`; changes nothing."""
    path = folder / LOCK
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
    return False


def check_free(folder: Path) -> None:
    """Refuse a folder that some process owns; changes nothing. `lock` refuses it too, but first makes the folder.

    Raises:
        BadInput: a process owns `folder`.
    """
    if in_use(folder):
        raise _owned(folder)


def wait_until_free(folder: Path, *, grace_s: float) -> None:
    """Give a process that is ending, maybe on a node that was lost, so much time to let go of `folder`.

    Raises:
        BadInput: a process still owns `folder` after that.
    """
    deadline = time.monotonic() + grace_s
    while in_use(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    check_free(folder)


def _owned(folder: Path) -> BadInput:
    owner = (folder / LOCK).read_text().strip() or "another process"
    return BadInput(
        f"run folder in use: {folder} is owned by {owner}",
        fix="wait for it or stop it, or use another folder",
    )


def check_config(
    folder: Path,
    config: dict[str, Any],
    *,
    fix: str = "use another folder, or the settings of this one",
    may_differ: tuple[str, ...] = (),
) -> None:
    """Refuse a run folder that was made with other settings; changes nothing.

    `may_differ` names fields, or whole sections, that a rerun may change.

    Raises:
        BadInput: `folder/config.json` differs from `config`; the message lists the fields.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file, not a run's folder", fix=fix)
    if not path.exists():
        return
    if told := other_settings(f"run folder {folder}", read_json(path), config, may_differ=may_differ):
        raise BadInput(told, fix=fix)


def other_settings(what: object, there: Any, asked: Any, *, may_differ: tuple[str, ...] = ()) -> str:
    """That `what` was made with other settings than those asked for, a line a field; empty where they are the same."""
    lines = "\n".join(
        f"  {name}: {old!r} in the folder, {new!r} asked for"
        for name, old, new in differences(there, asked)
        if not any(name == each or name.startswith(f"{each}.") for each in may_differ)
    )
    return f"{what} was made with other settings:\n{lines}" if lines else ""


def is_written(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the stage that writes `folder` in one go (`new_folder`) did so with these settings; changes nothing.

    Raises:
        BadInput: `folder` was made with other settings, or holds files of something else.
    """
    check_config(folder, config, fix="choose another output folder, or delete this one")
    if is_done(folder):
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(
            f"output {folder} exists and no finished stage wrote it",
            fix="choose another output folder, or delete this one",
        )
    return False


def claim(folder: Path, config: dict[str, Any], *, may_differ: tuple[str, ...] = ()) -> None:
    """`check_config`, then write `folder/config.json` unless it says so already. Hold `lock(folder)` meanwhile."""
    check_config(folder, config, may_differ=may_differ)
    path = folder / "config.json"
    if not path.exists() or any(differences(read_json(path), config)):
        write_json(path, config)


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, old value, new value) of each leaf at which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{prefix}.{index}")
    elif old != new:
        yield prefix, old, new


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(HASHED_BYTES, path.stat().st_size or HASHED_BYTES)))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def sha256_folder(folder: Path, pattern: str) -> str:
    """One SHA-256 over the names and contents of the files in `folder` that match `pattern`."""
    return sha256_files({path.name: sha256(path) for path in folder.glob(pattern)})


def sha256_files(sums: Mapping[str, str]) -> str:
    """One SHA-256 over files, of the name and the SHA-256 of each."""
    lines = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
