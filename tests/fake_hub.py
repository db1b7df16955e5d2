"""A stand-in for the Hugging Face Hub: a server on this machine that answers as the Hub does, or wrongly if told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = COMMIT[::-1]
GOOD, BAD = "hf_thetokenthathasaccess", "hf_thetokenthathasnone"
LARGE = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Repository:
    """A data set or a model; files above 1 kB are kept outside of git, as the Hub keeps large ones."""

    files: dict[str, bytes]
    gated: bool = False
    card: dict[str, object] = field(default_factory=dict)
    """What its README.md says in front of the text."""
    converted: dict[str, bytes] = field(default_factory=dict)
    """The Hub's own conversion to Parquet."""


@dataclass
class FakeHub:
    """What the server has, what it is to do wrong, and what it was asked."""

    url: str = ""
    storage_url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off."""
    stall: bool = False
    """Send half of a file and then nothing."""
    flip: bool = False
    """Change a byte of what is sent."""
    no_ranges: bool = False
    status: int = 0
    """Answer downloads with this status."""
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """The Range header of each request that was answered with content ('' for none)."""
        return [headers.get("range", "") for method, path, headers in self.asked if method == "GET" and "/get/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        url = urlsplit(self.path)
        self.hub.asked.append((self.command, unquote(url.path), headers))
        if match := re.fullmatch(r"/get/([^/]+/[^/]+)/(.+)", unquote(url.path)):
            repository = self.hub.repositories[match[1]]
            self._content({**repository.files, **repository.converted}[match[2]], headers)
            return
        match = re.fullmatch(
            r"/(?:api/)?(?:datasets/|models/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", url.path
        )
        if not match:
            self._send(404, {})
            return
        name, verb, revision, rest = map(unquote, match.groups())
        if name in self.hub.renamed:
            self._send(307, {"Location": self.path.replace(name, self.hub.renamed[name])})
            return
        repository = self.hub.repositories.get(name)
        if refusal := self._refusal(
            repository, verb, revision, headers.get("authorization", "").removeprefix("Bearer ")
        ):
            self._send(*refusal)
            return
        converted = revision in ("refs/convert/parquet", CONVERTED)
        commit, files = (CONVERTED, repository.converted) if converted else (COMMIT, repository.files)
        if verb == "revision":
            names = [{"rfilename": path} for path in files]
            self._send(200, {}, {"id": name, "sha": commit, "cardData": repository.card, "siblings": names})
        elif verb == "tree":
            entries = tree(files, rest, recursive=parse_qs(url.query)["recursive"] == ["true"])
            self._send(*((200, {}, entries) if entries else (404, {"X-Error-Code": "EntryNotFound"})))
        else:
            about = {
                "X-Repo-Commit": commit,
                "ETag": f'"{git_id(files[rest])}"',
                "X-Linked-Size": str(len(files[rest])),
            }
            self._send(302, {**about, "Location": f"{self.hub.storage_url}/get/{name}/{rest}"})

    def _refusal(
        self, repository: Repository | None, verb: str, revision: str, token: str
    ) -> tuple[int, dict[str, str]] | None:
        """(status, headers) of an answer that is no."""
        if token and token not in (GOOD, BAD):
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
        if repository is None:
            return 404 if token else 401, {"X-Error-Code": "RepoNotFound"}
        known = ("refs/convert/parquet", CONVERTED) if repository.converted else ()
        if revision not in ("main", COMMIT, *known):
            return 404, {"X-Error-Code": "RevisionNotFound"}
        if verb == "resolve" and repository.gated and token != GOOD:
            return 403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
        return (self.hub.status, {}) if verb == "resolve" and self.hub.status else None

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        start = 0
        if (match := re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))) and not self.hub.no_ranges:
            start = int(match[1])
        body = data[start:]
        if self.hub.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.hub.stall:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(60)
        if self.hub.cut_after:
            self.wfile.write(body[: self.hub.cut_after.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(body)

    def _send(self, status: int, headers: dict[str, str], value: object = None) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, content in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def tree(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    """What the Hub lists of a folder; it promises no order."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for path, data in files.items():
        first, _, more = path.removeprefix(prefix).partition("/")
        if not path.startswith(prefix):
            continue
        if more:
            entries[prefix + first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40}
        if recursive or not more:
            entries[path] = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
            if len(data) > 1000:
                sha256 = hashlib.sha256(data).hexdigest()
                entries[path]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
    return list(entries.values())


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[FakeHub]:
    """A Hub with these repositories, its storage a server of its own, until the block ends."""
    hub = FakeHub(repositories=repositories)
    with contextlib.ExitStack() as stack:
        servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub})) for _ in ("hub", "storage")
        ]
        for server in servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
        hub.url, hub.storage_url = (
            f"http://{host}:{server.server_port}"
            for host, server in zip(("127.0.0.1", "localhost"), servers, strict=True)
        )
        yield hub
