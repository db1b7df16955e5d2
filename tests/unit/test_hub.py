"""Files from the Hub, against a server that answers as the Hub does: all of a file or an error that says what to do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections import namedtuple
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import httpx
import pytest

from megatron_octo import lineage, rundir
from megatron_octo.cli import app
from megatron_octo.config.data import CorpusFacts, HubSource, PrepareConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert.hub_model import folder_of
from megatron_octo.convert.random_base import random_base
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.data import hub as hub_module
from megatron_octo.data.hub import HubFile, check_access, downloads_folder, fetch, release
from megatron_octo.data.hub_listing import plan_downloads
from megatron_octo.data.inputs import find_inputs
from megatron_octo.data.prepare import prepare
from megatron_octo.data.read import read_records
from megatron_octo.errors import BadInput, OctoError
from tests.conftest import REPOSITORY, snapshot, word_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = COMMIT[::-1]
GOOD, BAD = "hf_thetokenthathasaccess", "hf_thetokenthathasnone"
LARGE = bytes(range(256)) * 4096  # 1 MiB
TINY = ModelConfig(
    hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=24, vocab_size=32, tied_embeddings=True
)
Usage = namedtuple("Usage", "total used free")


@dataclass
class Repository:
    """A data set; files above 1 kB are kept outside of git, as the Hub keeps large ones."""

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


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A Hub of our own with a public and a gated data set; no token, no waiting."""
    hub = FakeHub()
    hub.repositories = {
        "owner/public": Repository(
            {
                "README.md": b"# A data set",
                "data/b.jsonl": b'{"text": "three"}\n',
                "data/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
                "large/c.parquet": LARGE,
            }
        ),
        "owner/gated": Repository({"data/a.jsonl": b'{"text": "one"}\n'}, gated=True),
    }
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
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = "{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{template}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub_module, "FIRST_WAIT_S", 0.0)
        yield hub


@pytest.fixture
def config(tmp_path) -> PrepareConfig:
    return PrepareConfig(
        name="web",
        hub=HubSource(repository="owner/public", files=("data/*.jsonl",)),
        template="text",
        tokenizer=tmp_path / "tokenizer",
        output=tmp_path / "data" / "web",
    )


@pytest.fixture
def gated(config) -> PrepareConfig:
    return replace(config, hub=HubSource(repository="owner/gated", files=("data/*.jsonl",), gated=True))


@pytest.fixture
def large(fake) -> HubFile:
    """The plan of the 1 MiB file."""
    (file,) = plan_downloads(HubSource(repository="owner/public", files=("large/*.parquet",)))
    return file


@pytest.fixture
def models(fake, monkeypatch, tmp_path) -> FakeHub:
    """The stand-in with a model; what is downloaded of it goes to a cache of this test."""
    files = {"config.json": b"{}", "model.safetensors": LARGE, "tokenizer.json": b"{}"}
    files |= {"LICENSE": b"terms", "USE_POLICY.md": b"policy"}
    others = {"pytorch_model.bin": b"a pickle", "modeling_own.py": b"code", "original/model.safetensors": LARGE}
    fake.repositories["owner/model"] = Repository({**files, **others})
    fake.repositories["owner/gated-model"] = Repository(files, gated=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return fake


def test_of_a_model_the_weights_settings_and_tokenizer_are_downloaded_and_no_code(models):
    folder = folder_of("owner/model", COMMIT)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "USE_POLICY.md"}
    assert (folder / "model.safetensors").read_bytes() == LARGE


@pytest.mark.parametrize(("token", "told"), [(None, "HF_TOKEN is not set"), (BAD, "the token's account has no access")])
def test_a_gated_model_without_access_names_the_licence_page(models, monkeypatch, token, told):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInput, match=f"model owner/gated-model is gated.*{told}") as caught:
        folder_of("owner/gated-model", None)
    assert caught.value.exit_code == 2
    assert "https://huggingface.co/owner/gated-model" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "revision", "told"),
    [
        ("owner/absent", None, "there is no model owner/absent"),
        ("owner/model", "v9", "model owner/model has no revision 'v9'"),
        ("owner/public", None, "has no config.json"),
        ("absent", None, "no such folder: absent"),
        ("/absent/folder", None, "no such folder"),
    ],
)
def test_a_model_that_is_not_there_is_told(models, name, revision, told):
    with pytest.raises(BadInput, match=told):
        folder_of(name, revision)


def test_a_model_whose_hub_cannot_be_reached_is_told(models, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", _no_answer)
    with pytest.raises(BadInput, match=r"owner/model is .* cannot be reached: ConnectError: no route") as caught:
        folder_of("owner/model", None)
    assert "hf download owner/model" in caught.value.fix


def _no_answer(*args: object, **options: object) -> None:
    raise httpx.ConnectError("no route")


@pytest.fixture
def from_hf(models, monkeypatch, capfd, tmp_path):
    """Run `octo convert from-hf NAME tmp_path/import ARGS`; returns exit code, stdout and stderr."""
    base = RandomBaseConfig(model=TINY, tokenizer=word_tokenizer(tmp_path / "words"), output=tmp_path / "base")
    files = {path.name: path.read_bytes() for path in random_base(base).iterdir() if path.name != "lineage.json"}
    for name, gated in (("owner/Llama-real", False), ("owner/gated-model", True)):
        models.repositories[name] = Repository(files, gated=gated)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the command sets it; this undoes that
    capfd.readouterr()

    def run(name: str, *args: str) -> tuple[int, str, str]:
        argv = ["convert", "from-hf", name, str(tmp_path / "import"), "--skip-logits", *args]
        return app.main(argv), *capfd.readouterr()

    return run


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_model_is_converted_by_its_name_on_the_hub(from_hf, tmp_path, revision):
    code, out, err = from_hf("owner/Llama-real", *(["--revision", revision] if revision else []))
    assert (code, out) == (0, f"{tmp_path / 'import'}\n"), err
    assert [link.name for link in lineage.read(tmp_path / "import").chain()] == ["Llama-real"] * 2
    export = to_hf(tmp_path / "import", tmp_path / "export", tmp_path / "words", dtype="fp32", verify=False)
    assert (export / "model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


def test_no_weights_are_downloaded_of_a_model_that_is_refused_nor_on_a_dry_run(from_hf, models, tmp_path):
    (tmp_path / "import").mkdir()
    (tmp_path / "import" / "file").touch()
    assert from_hf("owner/model")[0] == 2  # its config.json says nothing
    assert from_hf("owner/Llama-real")[0] == 2  # OUT holds something else
    (tmp_path / "import" / "file").unlink()
    assert from_hf("owner/Llama-real", "--dry-run")[0] == 0
    assert "config.json" in str(models.asked) and "safetensors" not in str([path for _, path, _ in models.asked])


def test_a_gated_model_is_converted_with_a_token_and_told_in_one_message_without(from_hf, monkeypatch, tmp_path):
    code, out, err = from_hf("owner/gated-model")
    assert (code, out) == (2, "") and err.count("fix: ") == 1 and "Traceback" not in err
    assert "https://huggingface.co/owner/gated-model and accept the terms" in err and "HF_TOKEN" in err
    assert not list(tmp_path.glob("*import*"))
    monkeypatch.setenv("HF_TOKEN", GOOD)
    code, _, err = from_hf("owner/gated-model")
    assert (code, rundir.is_done(tmp_path / "import")) == (0, True), err
    assert GOOD not in err


def test_a_folder_stands_for_itself_and_has_no_revision(tmp_path):
    assert folder_of(str(tmp_path), None) == tmp_path
    with pytest.raises(BadInput, match="has no revision v1"):
        folder_of(str(tmp_path), "v1")


def test_a_public_set_is_read_in_the_order_of_its_names(fake, config):
    folder = downloads_folder(config)
    files = plan_downloads(config.hub)
    assert [(file.path, file.commit) for file in files] == [("data/a.jsonl", COMMIT), ("data/b.jsonl", COMMIT)]
    check_access(config, files)
    assert not folder.exists()
    texts = []
    for file in files:
        texts += [row["text"] for row in read_records(fetch(file, folder))]
        release(file, folder)
        assert not list(folder.rglob("*.jsonl"))
    assert texts == ["one", "two", "three"]
    assert not folder.exists()


def test_a_commit_is_read_where_a_branch_is_named(fake, config):
    (first, _) = plan_downloads(config.hub)
    fetch(first, downloads_folder(config))
    assert [path for _, path, _ in fake.asked if "/resolve/" in path] == [
        f"/datasets/owner/public/resolve/{COMMIT}/data/a.jsonl"
    ]


def test_a_renamed_set_is_found_under_its_old_name(fake, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD)
    fake.renamed["old/name"] = "owner/public"
    files = plan_downloads(replace(config.hub, repository="old/name"))
    check_access(config, files)
    assert fetch(files[1], downloads_folder(config)).read_bytes() == b'{"text": "three"}\n'


def test_only_the_folders_of_the_patterns_are_listed(fake, config):
    plan_downloads(replace(config.hub, files=("data/a*", "data/b*", "large/c.parquet")))
    listed = [path.partition(COMMIT)[2] for _, path, _ in fake.asked if "/tree/" in path]
    assert listed == ["/data", "/large"]


def test_a_kept_download_is_verified_and_not_asked_for_again(fake, large, tmp_path):
    path = fetch(large, tmp_path)
    assert path == tmp_path / "large" / "c.parquet"
    assert fetch(large, tmp_path) == path
    assert fake.downloads() == [""]
    path.write_bytes(LARGE[:-1] + b"?")
    assert fetch(large, tmp_path).read_bytes() == LARGE
    assert fake.downloads() == ["", ""]


def test_a_gated_set_without_a_token_names_the_page(fake, gated, tmp_path):
    files = plan_downloads(gated.hub)
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match=r"gated.*HF_TOKEN is not set") as caught:
        check_access(gated, files)
    assert "https://huggingface.co/datasets/owner/gated and accept the terms" in caught.value.fix
    assert "set HF_TOKEN" in caught.value.fix
    assert snapshot(tmp_path) == before


def test_a_gated_set_with_a_token_that_has_no_access_names_the_page(fake, gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", BAD)
    with pytest.raises(BadInput, match="the token's account has no access") as caught:
        check_access(gated, plan_downloads(gated.hub))
    assert "https://huggingface.co/datasets/owner/gated as that account" in caught.value.fix


def test_a_gated_set_is_read_with_a_token_that_the_storage_never_sees(fake, gated, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", GOOD)
    (file,) = plan_downloads(gated.hub)
    check_access(gated, [file])
    assert fetch(file, tmp_path).read_bytes() == fake.repositories["owner/gated"].files["data/a.jsonl"]
    sent = {path.split("/")[1]: "authorization" in headers for _, path, headers in fake.asked}
    assert sent == {"api": True, "datasets": True, "get": False}


def test_access_lost_on_the_way_names_the_page(fake, gated, tmp_path):
    (file,) = plan_downloads(gated.hub)
    with pytest.raises(BadInput, match="gated"):
        fetch(file, tmp_path)


@pytest.mark.parametrize("token", [None, GOOD])
def test_a_wrong_name_is_named(fake, config, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInput, match="no data set owner/pubic on the Hub, or it is private"):
        plan_downloads(replace(config.hub, repository="owner/pubic"))
    with pytest.raises(BadInput, match="'owner/public/data' is no data set's name"):
        plan_downloads(replace(config.hub, repository="owner/public/data"))


def test_a_wrong_revision_is_named(fake, config):
    with pytest.raises(BadInput, match="owner/public has no revision 'v2'"):
        plan_downloads(replace(config.hub, revision="v2"))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("data/*.parquet", "data/a.jsonl"), ("date/*.jsonl", "data/"), ("dat/x/*.jsonl", "data/"), ("a.jsonl", "data/")],
)
def test_a_pattern_that_fits_nothing_shows_what_is_near(fake, config, pattern, near):
    with pytest.raises(BadInput, match=f"has no file '{re.escape(pattern)}' at revision main") as caught:
        plan_downloads(replace(config.hub, files=("data/*.jsonl", pattern)))
    assert near in caught.value.fix


def test_a_pattern_means_what_it_means_to_glob(fake, config):
    names = ("a.jsonl", "x/a.jsonl", "x/y/a.jsonl", "x/y/b.jsonl", "xy/a.jsonl")
    fake.repositories["owner/public"] = Repository(dict.fromkeys(names, b"{}"))

    def found(*patterns: str) -> list[str]:
        return [each.path for each in plan_downloads(replace(config.hub, files=patterns))]

    assert found("*.jsonl") == ["a.jsonl"]
    assert found("*/*.jsonl") == ["x/a.jsonl", "xy/a.jsonl"]
    assert found("**/a.jsonl") == ["a.jsonl", "x/a.jsonl", "x/y/a.jsonl", "xy/a.jsonl"]
    assert found("x/**") == ["x/a.jsonl", "x/y/a.jsonl", "x/y/b.jsonl"]
    assert found("x/**/[b-z].jsonl", "?.jsonl") == ["a.jsonl", "x/y/b.jsonl"]


def test_a_file_of_no_kind_that_we_read_is_refused(fake, config):
    with pytest.raises(BadInput, match=r"README\.md is of no kind that can be read"):
        plan_downloads(replace(config.hub, files=("*",)))


CARD = [
    {
        "config_name": "main",
        "data_files": [{"split": "train", "path": "main/train-*"}, {"split": "test", "path": "t.jsonl"}],
    },
    {"config_name": "socratic", "default": True, "data_files": {"train": ["s/a.jsonl", "s/b.jsonl"]}},
    {"config_name": "plain", "data_dir": "p", "data_files": "**/*.jsonl"},
    {"config_name": "nowhere"},
]


@pytest.fixture
def named(fake):
    """The paths of what (subset, split, revision) name in a data set of these files, card and conversion."""

    def paths(subset: str, split: str, *, files=(), card=None, converted=(), revision: str = "main") -> list[str]:
        fake.repositories["owner/named"] = Repository(
            dict.fromkeys(("README.md", *files), b"{}"),
            card={"license": "mit", "configs": card} if card else {},
            converted=dict.fromkeys(converted, b"{}"),
        )
        hub = HubSource(repository="owner/named", subset=subset, split=split, revision=revision)
        return [each.path for each in plan_downloads(hub)]

    return paths


def test_a_subset_and_a_split_are_the_files_that_the_card_says(named):
    files = ("main/train-0.jsonl", "main/train-1.jsonl", "main/test-0.jsonl", "t.jsonl", "s/a.jsonl", "s/b.jsonl")
    files += ("p/a.jsonl", "p/q/b.jsonl")
    for subset, split, found in (
        ("main", "train", ["main/train-0.jsonl", "main/train-1.jsonl"]),
        ("main", "test", ["t.jsonl"]),
        ("socratic", "train", ["s/a.jsonl", "s/b.jsonl"]),
        ("", "train", ["s/a.jsonl", "s/b.jsonl"]),
        ("plain", "train", ["p/a.jsonl", "p/q/b.jsonl"]),
    ):
        assert named(subset, split, files=files, card=CARD) == found
    assert named("", "test", files=files, card=CARD[:1]) == ["t.jsonl"]
    assert named("", "test", files=files, card=CARD[0]) == ["t.jsonl"]


@pytest.mark.parametrize(
    ("asked", "card", "reason", "fix"),
    [
        (("mian", "train"), CARD, "no subset mian", "main, socratic, plain"),
        (("", "train"), [CARD[0], CARD[2]], "no default subset", "main, plain"),
        (("main", "dev"), CARD, "no split dev in subset main", "train, test"),
        (("", "train"), ["main"], "malformed at `configs`", "`files`"),
        (("", "train"), [{"data_files": [{"split": "train"}]}], "malformed at `configs`", "`files`"),
        (("main", "train"), CARD, r"no file 'main/train-\*'", "README.md"),
    ],
)
def test_a_subset_or_a_split_that_there_is_not_is_named_with_those_there_are(named, asked, card, reason, fix):
    with pytest.raises(BadInput, match=reason) as caught:
        named(*asked, card=card)
    assert fix in caught.value.fix


def test_without_a_card_a_split_is_where_uploads_put_it(named):
    files = ("data/train-0.parquet", "data/train_sft-0.parquet", "extra/train-0.parquet", "data/test-0.parquet")
    assert named("", "train", files=files) == ["data/train-0.parquet"]
    assert named("extra", "train", files=files, card=[{"config_name": "extra"}]) == ["extra/train-0.parquet"]


def test_else_a_split_is_where_the_hub_has_converted_it(fake, named, tmp_path):
    converted = ("default/train/0000.parquet", "default/train/0001.parquet", "other/partial-train/0000.parquet")
    found = ["default/train/0000.parquet", "default/train/0001.parquet"]
    assert named("", "train", files=("a.csv",), converted=converted) == found
    (file, _) = plan_downloads(HubSource(repository="owner/named", split="train"))
    assert file.commit == CONVERTED
    assert fetch(file, tmp_path).read_bytes() == b"{}"
    for subset, split, reason in (
        ("other", "train", "converted only its beginning"),
        ("third", "train", "no subset third"),
        ("default", "test", "no split test in subset default"),
    ):
        with pytest.raises(BadInput, match=reason):
            named(subset, split, converted=converted)
    for revision, reason in (("main", "nor has the Hub converted it"), (COMMIT, r"no data/train-\*$")):
        with pytest.raises(BadInput) as caught:
            named("", "train", converted=converted if revision == COMMIT else (), revision=revision)
        assert re.search(reason, caught.value.what)
        assert "`files`" in caught.value.fix


@pytest.mark.parametrize(
    "named_by", [{}, {"subset": "main"}, {"files": ("a",), "split": "b"}, {"files": ("a",), "subset": "b"}]
)
def test_a_source_names_files_or_a_split(named_by):
    with pytest.raises(BadInput, match="data set owner/public with files"):
        HubSource(repository="owner/public", **named_by)


def test_a_token_that_the_hub_does_not_know_is_told_so(fake, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    with pytest.raises(BadInput, match=r"401.*does not accept the token"):
        plan_downloads(config.hub)


def test_offline_says_how_to_go_on(fake, config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="only when online") as caught:
        plan_downloads(config.hub)
    assert (
        "hf download owner/public --repo-type dataset --revision main --include 'data/*.jsonl' --local-dir"
        in caught.value.fix
    )
    with pytest.raises(BadInput) as caught:
        plan_downloads(replace(config.hub, files=("data/**/*.jsonl",)))
    assert "--include 'data/**.jsonl' --local-dir" in caught.value.fix  # there a star stands for folders too
    with pytest.raises(BadInput) as caught:
        plan_downloads(replace(config.hub, files=(), split="train"))
    assert "--revision main --local-dir" in caught.value.fix
    assert "`input`" in caught.value.fix
    assert fake.asked == []


def test_an_unreachable_hub_says_how_to_go_on(fake, config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=r"only when online, and http://127\.0\.0\.1:9 cannot be reached") as caught:
        plan_downloads(config.hub)
    assert "`input`" in caught.value.fix


@pytest.fixture
def free(monkeypatch):
    """Sets what is free on the disk."""
    return lambda length: monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, length))


def test_a_disk_must_hold_the_largest_files_and_the_tokens(fake, config, free):
    small = fake.repositories["owner/public"].files["data/a.jsonl"]
    fake.repositories["owner/public"].files |= {"data/c.jsonl": LARGE, "data/d.jsonl": LARGE, "data/e.jsonl": small}
    config = replace(config, facts=CorpusFacts(licence="MIT", expected_tokens=300))
    needed = 2 * len(LARGE) + 300 * 4
    free(needed)
    find_inputs(config)
    free(needed - 1)
    with pytest.raises(BadInput, match=r"needs 2\.0 MiB .* 2\.0 MiB are free.*the largest 2 of 5 files.* 1,200 bytes"):
        find_inputs(config)
    with pytest.raises(BadInput, match=r"1,500 bytes for the tokens \(300 of 5 bytes, as facts\.expected_tokens says"):
        find_inputs(replace(config, template="chat", mark_answers=True))
    free(300 * 4 - 1)
    with pytest.raises(BadInput, match=r"600 bytes for the tokens"):
        find_inputs(config, token_bytes=2)


def test_what_is_there_already_needs_no_room(fake, config, free):
    config = replace(config, facts=CorpusFacts(licence="MIT", expected_tokens=300))
    for file in plan_downloads(config.hub):
        fetch(file, downloads_folder(config))
    config.output.mkdir()
    (config.output / "00000.bin").write_bytes(bytes(1000))
    free(200)
    find_inputs(config)
    (config.output / "00000.bin").write_bytes(bytes(999))
    with pytest.raises(BadInput, match="200 bytes are free"):
        find_inputs(config)


def test_without_a_count_of_tokens_their_room_is_guessed(fake, config, free):
    config = replace(config, hub=replace(config.hub, files=("large/*.parquet",)))
    free(3 * len(LARGE) - 1)
    with pytest.raises(BadInput, match=r"2\.0 MiB for the tokens \(guessed from the files' length\)"):
        find_inputs(config)
    free(3 * len(LARGE))
    find_inputs(config)


def test_a_disk_must_hold_the_tokens_of_files_of_this_machine(config, free, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 100)
    config = replace(config, hub=None, input=tmp_path / "a.jsonl")
    free(1400)
    find_inputs(config)
    free(1399)
    with pytest.raises(BadInput, match=r"needs 1,400 bytes .* 1,399 bytes are free: 1,400 bytes for the tokens"):
        find_inputs(config)
    find_inputs(replace(config, facts=CorpusFacts(licence="MIT", expected_tokens=100)))


def test_a_file_that_the_hub_does_not_serve_whole_is_refused_before(fake, config, large):
    with pytest.raises(BadInput, match=r"c\.parquet has 60\.0 GiB"):
        check_access(config, [replace(large, size_bytes=60 << 30)])


def test_a_download_that_breaks_off_goes_on_where_it_was(fake, large, tmp_path):
    fake.cut_after = [300_000, 0, 400_000]
    path = fetch(large, tmp_path)
    assert path.read_bytes() == LARGE
    assert fake.downloads() == ["", "bytes=300000-", "bytes=300000-", "bytes=700000-"]
    assert [each.name for each in path.parent.iterdir()] == ["c.parquet"]


def test_a_download_that_is_given_up_goes_on_next_time(fake, large, tmp_path):
    fake.cut_after = [300_000] + [0] * 6
    with pytest.raises(OctoError, match="stopped at") as caught:
        fetch(large, tmp_path)
    assert caught.value.exit_code == 1
    assert "goes on from there" in caught.value.fix
    assert not (tmp_path / "large" / "c.parquet").exists()
    asked = len(fake.downloads())
    assert fetch(large, tmp_path).read_bytes() == LARGE
    assert fake.downloads()[asked:] == ["bytes=300000-"]


def test_a_download_whose_process_is_killed_goes_on(fake, large, tmp_path):
    fake.stall = True
    program = (
        "import sys\nfrom pathlib import Path\nfrom megatron_octo.data.hub import HubFile, fetch\n"
        f"fetch({large!r}, Path(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "home")},
    )
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in tmp_path.rglob("*.part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    fake.stall = False
    (part,) = tmp_path.rglob("*.part")
    there = part.stat().st_size
    assert 0 < there < len(LARGE)
    assert fetch(large, tmp_path).read_bytes() == LARGE
    assert fake.downloads() == ["", f"bytes={there}-"]


def test_a_server_without_ranges_sends_all_of_it_again(fake, large, tmp_path):
    fake.cut_after, fake.no_ranges = [300_000], True
    assert fetch(large, tmp_path).read_bytes() == LARGE


def test_a_download_that_differs_from_the_listing_is_refused(fake, large, tmp_path):
    fake.flip = True
    with pytest.raises(OctoError, match=r"c\.parquet is not what the Hub lists"):
        fetch(large, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_small_file_is_verified_too(fake, config, tmp_path):
    (small, _) = plan_downloads(config.hub)
    assert small.sha256 is None
    fake.flip = True
    with pytest.raises(OctoError, match=r"a\.jsonl is not what the Hub lists"):
        fetch(small, tmp_path)


def test_a_damaged_part_costs_one_more_download(fake, large, tmp_path):
    fake.cut_after = [300_000] + [0] * 6
    with pytest.raises(OctoError):
        fetch(large, tmp_path)
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(bytes(300_000))
    asked = len(fake.downloads())
    assert fetch(large, tmp_path).read_bytes() == LARGE
    assert fake.downloads()[asked:] == ["bytes=300000-", ""]


def test_a_busy_hub_is_asked_again_and_then_given_up(fake, large, tmp_path):
    fake.status = 503
    with pytest.raises(OctoError, match="the Hub answers 503"):
        fetch(large, tmp_path)


def test_the_token_is_never_shown(fake, gated, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    caplog.set_level(logging.DEBUG, logger="huggingface_hub")
    shown = ""
    for token in (GOOD, BAD, "hf_mistyped"):
        monkeypatch.setenv("HF_TOKEN", token)
        for cut in ([], [3, *[0] * 6]):
            fake.cut_after = cut
            try:
                (file,) = plan_downloads(gated.hub)
                check_access(gated, [file])
                fetch(file, tmp_path / f"{token[3:6]}{len(cut)}")
            except OctoError:
                shown += traceback.format_exc()
    assert "no access" in shown and "does not accept" in shown and "stopped at" in shown and caplog.text
    files = "".join(snapshot(tmp_path)) + "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for token in (GOOD, BAD, "hf_mistyped"):
        assert token not in shown + caplog.text + files


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_hubs_own_environment_variables_are_honoured(fake, tmp_path, offline):
    program = (
        "from megatron_octo.config.data import HubSource\nfrom megatron_octo.data.hub_listing import plan_downloads\n"
        "print(len(plan_downloads(HubSource(repository='owner/public', files=('data/*.jsonl',)))))"
    )
    environment = {**os.environ, "HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if offline == "1":
        assert "HF_HUB_OFFLINE is set" in done.stderr
    else:
        assert done.stdout == "2\n", done.stderr


def test_hugging_face_is_loaded_only_when_it_is_used():
    program = "import sys, megatron_octo.data.inputs\nprint('huggingface_hub' in sys.modules, 'httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_release_keeps_what_is_not_its_own(fake, large, config):
    folder = downloads_folder(config)
    path = fetch(large, folder)
    (folder / "large" / "other.parquet").write_bytes(b"")
    release(large, folder)
    release(large, folder)
    assert not path.exists()
    assert (folder / "large" / "other.parquet").exists()
    assert Path(folder).is_dir()


@pytest.fixture
def ready(fake, config, tokenizer_folder) -> PrepareConfig:
    """A source of three files, one of them large, in shards that end with a file."""
    lines = [b"".join(b'{"text": "document %d of %d"}\n' % (at, n) for at in range(200)) for n in range(3)]
    files = {f"data/part{n}.jsonl": each for n, each in enumerate(lines)} | {"data/part9.jsonl": b'{"text": "last"}\n'}
    fake.repositories["owner/public"] = Repository(files)
    return replace(config, tokenizer=tokenizer_folder, shard_tokens=10)


def test_a_source_on_the_hub_becomes_the_same_data_set_as_its_files_here(fake, ready, tmp_path):
    manifest = prepare(ready, num_workers=2)
    assert not downloads_folder(ready).exists()
    assert [str(each.file.path) for each in manifest.sources] == [
        f"datasets/owner/public@{COMMIT}/data/part{n}.jsonl" for n in (0, 1, 2, 9)
    ]
    for name, content in fake.repositories["owner/public"].files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    local = replace(ready, hub=None, input=tmp_path / "data" / "*.jsonl", output=tmp_path / "local")
    assert prepare(local).shards == manifest.shards
    assert [each.sha256 for each in manifest.sources] == [each.sha256 for each in prepare(local).sources]
    assert prepare(ready) == manifest  # done: the Hub is not asked


def test_an_attempt_that_the_hub_ended_goes_on_with_the_same_commit(fake, ready):
    whole = fake.repositories["owner/public"].files

    def fetch_two(file, folder):
        if file.path.endswith("part2.jsonl"):
            raise OctoError("the Hub is ill")
        return fetch(file, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_octo.data.inputs.fetch", fetch_two)
        with pytest.raises(OctoError, match="the Hub is ill"):
            prepare(ready, num_workers=1)
    progress = json.loads((ready.output / "progress.json").read_text())
    assert len(progress["shards"]) == 2
    fake.repositories["owner/public"] = Repository({**whole, "data/part1a.jsonl": b'{"text": "new"}\n'})
    fake.asked.clear()
    manifest = prepare(ready, num_workers=1)
    assert manifest.documents == 601  # the new file is of a later commit
    assert not any("part0.jsonl" in path for _, path, _ in fake.asked)
    assert not downloads_folder(ready).exists()
