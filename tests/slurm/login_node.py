"""The login node of a Slurm: an sshd of the tests' own on 127.0.0.1, and a user's ~/.ssh that knows it."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.slurm.cluster import free_ports, wait_for

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")
PRIVILEGE_SEPARATION = Path("/run/sshd")


def missing() -> str:
    """Why there can be no sshd here, empty if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed: apt-get install openssh-server rsync" if absent else ""


@contextlib.contextmanager
def login_node(folder: Path, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Let `ssh cluster` reach this machine with `environment` there; yields what the user who types it needs."""
    ssh, bin_folder = folder / "home" / ".ssh", folder / "bin"
    for each in (ssh, bin_folder):
        each.mkdir(parents=True)
    for key in ("host_key", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / key], check=True)
    (port,) = free_ports(1)
    host_key = (ssh / "host_key.pub").read_text()
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (ssh / "config").write_text(f"""\
Host cluster 127.0.0.1
    HostName 127.0.0.1
    Port {port}
    User {getpass.getuser()}
    IdentityFile {ssh}/id
    UserKnownHostsFile {ssh}/known_hosts
""")
    (bin_folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {ssh}/config "$@"\n')  # it asks no HOME
    (bin_folder / "ssh").chmod(0o755)
    (ssh / "sshd_config").write_text(f"""\
ListenAddress 127.0.0.1
Port {port}
HostKey {ssh}/host_key
PidFile none
AuthorizedKeysFile {ssh}/id.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv {" ".join(f"{name}={value}" for name, value in environment.items())}
""")
    PRIVILEGE_SEPARATION.mkdir(exist_ok=True)
    command = [shutil.which("sshd") or "", "-D", "-e", "-f", ssh / "sshd_config"]  # it insists on its whole path
    with (ssh / "log").open("w") as log, subprocess.Popen(command, stderr=log) as sshd:
        try:
            wait_for(lambda: listens(port))
            yield {"HOME": str(folder / "home"), "PATH": f"{bin_folder}:/usr/sbin:/usr/bin:/bin"}
        finally:
            sshd.terminate()


def listens(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
