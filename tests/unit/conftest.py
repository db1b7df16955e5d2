"""Small generated corpora and a tokenizer learnt from them, a small model in both forms, a stand-in for the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_octo.config.data import PrepareInput, SyntheticConfig, TokenizerConfig
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert.from_hf import from_hf
from megatron_octo.convert.random_base import random_base
from megatron_octo.data.read import read_records
from megatron_octo.data.synthetic import generate
from megatron_octo.data.templates import renderer
from megatron_octo.data.tokenizer_training import train_tokenizer
from tests.fake_hub import LARGE, FakeHub, Repository, serving
from tests.unit.small_model import MODEL

KINDS = {"web": "text", "short": "question_answer", "long": "long_cot", "chat": "chat"}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of corpora of 1000 documents each, 60 RL problems and 400 held-out ones."""
    folder = tmp_path_factory.mktemp("data") / "corpora"
    documents = tuple((name, 1000) for name in KINDS)
    generate(SyntheticConfig(output=folder, documents=documents, num_rl_problems=60, num_heldout_problems=400))
    return folder


@pytest.fixture(scope="session")
def texts(corpora: Path) -> list[str]:
    """The text of every document of the corpora."""
    return [renderer(kind)(row).text for name, kind in KINDS.items() for row in read_records(corpora / f"{name}.jsonl")]


@pytest.fixture(scope="session")
def tokenizer_config(corpora: Path) -> TokenizerConfig:
    """Settings that learn 384 pieces from the corpora."""
    inputs = tuple(PrepareInput(input=corpora / f"{name}.jsonl", template=kind) for name, kind in KINDS.items())
    output = corpora.with_name("tokenizer")
    return TokenizerConfig(inputs=inputs, output=output, vocab_size=384, documents_per_input=500)


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer_config: TokenizerConfig) -> Path:
    """The trained tokenizer."""
    train_tokenizer(tokenizer_config)
    return tokenizer_config.output


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder of 20 ids, begin 1, end 2."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """A folder with `base`, a random model, and `import`, made from it."""
    folder = tmp_path_factory.mktemp("made")
    random_base(RandomBaseConfig(model=MODEL, tokenizer=words, output=folder / "base"))
    from_hf(folder / "base", folder / "import", logits=False)
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """The random model, to spoil."""
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub of our own with a public and a gated data set; no token, no waiting."""
    repositories = {
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
    with serving(repositories) as hub:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = "{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{template}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("megatron_octo.data.hub.FIRST_WAIT_S", 0.0)
        yield hub
