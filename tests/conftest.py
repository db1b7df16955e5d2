"""Fixtures that several tiers share. `tests/README.md` says what each tier is."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
Octo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty root folder for runs, in OCTO_RUNS."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("OCTO_RUNS", str(folder))
    return folder


@pytest.fixture
def octo(runs: Path) -> Octo:
    """Run `octo ARGS` as a user does, in the repository's folder; returns the completed process."""

    def run(*args: object, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "megatron_octo", *map(str, args)],
            cwd=REPOSITORY,
            env={**os.environ, "OCTO_RUNS": str(runs), "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder` with the hash of its content: equal snapshots, nothing changed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def flip_bit(path: Path) -> None:
    """Change one bit, in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_model_folder(folder: Path) -> Path:
    """A Hugging Face folder as far as checks look into it: no weights, and a tokenizer of one id."""
    import tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"vocab_size": 8}')
    (folder / "model.safetensors").write_bytes(b"weights")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    return folder


def word_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of three ids; what it does not know is the third."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
