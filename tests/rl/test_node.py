"""A node's part in RL on several, with scripts in place of Ray."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_octo.errors import OctoError
from megatron_octo.rl import node
from megatron_octo.rl.node import UP, Meeting, follow, lead

STAYS = "pathlib.Path(sys.argv[1], {up!r}).touch(); time.sleep(60)"


@pytest.fixture
def head() -> Iterator[socket.socket]:
    """A port that takes connections as Ray's head does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def meeting(tmp_path: Path, head: socket.socket) -> Meeting:
    """Where it is."""
    return Meeting(host="127.0.0.1", port=head.getsockname()[1], token=tmp_path / "ray_token", num_gpus=2)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> list[Path]:
    """Have `script` stand for a node's Ray, whose folder is its argument; returns the folders of its starts."""
    folders: list[Path] = []

    def command(meeting: Meeting, folder: Path, cuda: bool) -> list[str]:
        folders.append(folder)
        return [sys.executable, "-c", f"import os, pathlib, sys, time; {script.format(up=UP)}", str(folder)]

    monkeypatch.setattr(node, name, command)
    return folders


def test_the_first_node_runs_the_command_on_its_ray_and_ends_with_its_code(
    meeting: Meeting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = stand_in(monkeypatch, "_head", STAYS)
    said = tmp_path / "said"
    script = (
        "import os, pathlib, sys; e = os.environ; token = pathlib.Path(e['RAY_AUTH_TOKEN_PATH']); "
        f"pathlib.Path({str(said)!r}).write_text(f'{{e[\"RAY_ADDRESS\"]}} {{len(token.read_text())}} {{sys.argv[1]}} '"
        "+ str(token.with_name('ray_has_begun').exists())); sys.exit(3)"
    )
    monkeypatch.setattr(node, "octo_command", lambda *argv: [sys.executable, "-c", script, *argv])
    assert lead(meeting, ["rl"]) == 3
    assert said.read_text() == f"{meeting.address} 64 rl True"
    assert not meeting.token.exists() and not meeting.begun.exists()
    assert not any(folder.exists() for folder in folders)


def test_another_node_joins_once_ray_has_begun_and_ends_when_the_head_does(
    meeting: Meeting, head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = stand_in(monkeypatch, "_worker", STAYS)
    joined = threading.Thread(target=follow, args=(meeting,))
    joined.start()
    time.sleep(0.5)
    assert not folders
    meeting.begun.touch()
    deadline = time.monotonic() + 30
    while not (folders and (folders[0] / UP).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    assert joined.is_alive()
    head.close()
    joined.join(30)
    assert not joined.is_alive() and not folders[0].exists()


def test_a_ray_that_ends_before_the_head_is_an_error(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "_worker", STAYS.replace("60", "0.5") + "; sys.exit(7)")
    meeting.begun.touch()
    with pytest.raises(OctoError, match=r"Ray ended on .* with code 7"):
        follow(meeting)


def test_a_node_whose_ray_does_not_start_tries_again_in_another_folder(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = stand_in(monkeypatch, "_worker", "sys.exit(9)")
    meeting.begun.touch()
    with pytest.raises(OctoError, match="ended with code 9"):
        follow(meeting)
    assert len(set(folders)) == 3


def test_a_first_node_that_does_not_come_is_not_waited_for_for_ever(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "HEAD_TIMEOUT_S", 0.0)
    with pytest.raises(OctoError, match=r"there is no .*ray_has_begun"):
        follow(meeting)
