"""Models from the Hub, against a stand-in: what `octo convert from-hf` downloads, and what it says when it cannot."""

from __future__ import annotations

import httpx
import huggingface_hub
import pytest

from megatron_octo import lineage, rundir
from megatron_octo.cli import app
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert.hub_model import Found, find_model
from megatron_octo.convert.random_base import random_base
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.errors import BadInput
from tests.conftest import word_tokenizer
from tests.fake_hub import BAD, COMMIT, GOOD, LARGE, FakeHub, Repository

TINY = ModelConfig(
    hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=24, vocab_size=32, tied_embeddings=True
)


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
    folder = find_model("owner/model", COMMIT).folder
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "USE_POLICY.md"}
    assert (folder / "model.safetensors").read_bytes() == LARGE


@pytest.mark.parametrize(("token", "told"), [(None, "HF_TOKEN is not set"), (BAD, "the token's account has no access")])
def test_a_gated_model_without_access_names_the_licence_page(models, monkeypatch, token, told):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInput, match=f"model owner/gated-model is gated.*{told}") as caught:
        find_model("owner/gated-model", None)
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
        find_model(name, revision)


def test_a_model_whose_hub_cannot_be_reached_is_told(models, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", _no_answer)
    with pytest.raises(BadInput, match=r"owner/model is .* cannot be reached: ConnectError: no route") as caught:
        find_model("owner/model", None)
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
    base, made = lineage.read(tmp_path / "import").chain()
    assert (base.name, made.name, base.origin) == ("Llama-real", "Llama-real", f"owner/Llama-real@{COMMIT}")
    export = to_hf(tmp_path / "import", tmp_path / "export", tmp_path / "words", dtype="fp32", verify=False)
    assert (export / "model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()
    assert f"* base: Llama-real, owner/Llama-real@{COMMIT} on the" in (export / "README.md").read_text()


def test_the_weights_are_of_the_commit_that_the_settings_are_of(from_hf, models, tmp_path, monkeypatch):
    asked = []
    snapshot = huggingface_hub.snapshot_download

    def download(*args, revision, **options):
        asked.append(revision)
        return snapshot(*args, revision=revision, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert from_hf("owner/Llama-real")[0] == 0
    assert asked == ["main", COMMIT]


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
    assert find_model(str(tmp_path), None) == Found(folder=tmp_path)
    with pytest.raises(BadInput, match="has no revision v1"):
        find_model(str(tmp_path), "v1")
