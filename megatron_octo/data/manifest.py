"""What a prepared data set says about itself: `manifest.json` beside the shards.

Training reads it before torch loads: how many tokens there are, which tokenizer made them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_octo.config.base import Settings, read_settings, require, to_dict
from megatron_octo.config.data import PrepareConfig
from megatron_octo.errors import BadInput
from megatron_octo.rundir import is_done, read_json, sha256, write_json

FILE = "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
END_OF_TEXT, TURN_ENDS = "<|end_of_text|>", ("<|eot_id|>", "<|eom_id|>")  # Llama 3's
TOKEN_BYTES = {"uint16": 2, "int32": 4}
PREPARE = "run `octo data prepare RECIPE` with the recipe that holds this source"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileState(Settings):
    """A text file as it was when reading began."""

    path: Path
    """Where it is; for a file of the Hub its name there."""
    size_bytes: int
    """Its length, as stored (compressed, if it is)."""
    modified_ns: int
    """When it was last written; 0 for a file of the Hub, whose commit says what it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord(Settings):
    """A text file that was read."""

    file: FileState
    sha256: str
    """Hash of its bytes, as stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecord(Settings):
    """The tokenizer that made the ids."""

    sha256: str
    """`tokenizer_sha256` of it: what two data sets must share to be mixed."""
    vocab_size: int
    """Ids are below this."""
    bos_token: str | None
    """How the token that begins documents is spelt, None if the tokenizer has none."""
    bos_id: int | None
    """Its id."""
    eos_token: str | None
    """How the token that ends documents is spelt, None if the tokenizer has none."""
    eos_id: int | None
    """Its id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord(Settings):
    """One pair of PREFIX.bin and PREFIX.idx, in megatron-core's IndexedDataset format."""

    prefix: str
    """File name without its ending, relative to the folder."""
    documents: int
    """Documents in it."""
    tokens: int
    """Tokens in it."""
    bin_sha256: str
    """Hash of the .bin file."""
    idx_sha256: str
    """Hash of the .idx file."""
    loss_sha256: str | None = None
    """Hash of the .loss file, a byte a token: 1 in answers. None where there is none."""
    ids_sha256: str | None = None
    """Hash of the .ids file, the documents' own ids as JSON, a line each. None where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest(Settings):
    """A prepared data set: what is in it and what it was made from."""

    version: Literal[2] = 2
    """Version of this file's format."""
    config: PrepareConfig
    """The settings that made it, its `output` being the folder of this file (`.`); where several data sets were
    merged, those of the first, which only say for the first where its records were."""
    packages: tuple[str, ...]
    """What wrote it and what encoded, with their versions: more than two where an upgrade or a merge came between."""
    documents: int
    """Documents in all shards."""
    tokens: int
    """Tokens in all shards, control ids included."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    rejected: int
    """Bad records left out: they lack a field of the template, have no text, or cannot be read (rejected.jsonl)."""
    filtered: int = 0
    """Records left out by the source's own filter."""
    control_texts: tuple[tuple[str, int], ...] = ()
    """(spelling of a control token, how often it stood in the texts): encoded as ordinary text."""
    dtype: Literal["uint16", "int32"]
    """Number format of an id in the .bin files."""
    tokenizer: TokenizerRecord
    """The tokenizer."""
    sources: tuple[FileRecord, ...]
    """The text files."""
    shards: tuple[ShardRecord, ...]
    """The shards, in order."""
    validation: tuple[ShardRecord, ...] = ()
    """Shards of documents held out; not counted in documents and tokens."""

    def __post_init__(self) -> None:
        for field in ("documents", "tokens"):
            total, parts = getattr(self, field), sum(getattr(shard, field) for shard in self.shards)
            require(
                total == parts,
                f"manifest of {self.config.name}: {total:,} {field}, but {parts:,} in its shards",
                fix=f"{PREPARE}; the file was changed by hand",
            )

    @property
    def identity(self) -> str:
        """One hash over all shards, those held out too: it changes when a byte does that training reads."""
        parts = [(each.bin_sha256, each.idx_sha256, each.loss_sha256) for each in (*self.shards, *self.validation)]
        return hashlib.sha256(repr((len(self.shards), parts)).encode()).hexdigest()

    def prefixes(self, folder: Path) -> list[Path]:
        """The shards' paths in `folder`, without .bin and .idx, as IndexedDataset takes them."""
        return [folder / shard.prefix for shard in self.shards]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared data set, its shards seen to be there in full length.

    Raises:
        BadInput: `folder` is missing, unfinished, or does not hold what its manifest says.
    """
    if not is_done(folder) or not (folder / FILE).exists():
        state = "is not finished: it has no DONE" if folder.exists() else "does not exist"
        raise BadInput(f"prepared data set {folder} {state}", fix=PREPARE)
    manifest = read_settings(Manifest, folder / FILE)
    for shard in (*manifest.shards, *manifest.validation):
        _check_length(folder / f"{shard.prefix}.bin", shard.tokens * TOKEN_BYTES[manifest.dtype])
        _check_length(folder / f"{shard.prefix}.idx", None)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`."""
    write_json(folder / FILE, to_dict(manifest))


def tokenizer_file(path: Path) -> Path:
    """The file that encodes: tokenizer.json of a folder, else its tokenizer.model; or `path` itself if it is a file.

    Raises:
        BadInput: there is none.
    """
    return _tokenizer_files(path)[0]


def tokenizer_sha256(path: Path) -> str:
    """Identity of a tokenizer: one hash over a folder's tokenizer.json and tokenizer.model, whichever there are, or
    over the one file given; and over the tokens that begin and end documents.

    Raises:
        BadInput: `path` holds neither.
    """
    files = "".join(f"{each.name} {sha256(each)}\n" for each in _tokenizer_files(path))
    return hashlib.sha256(f"{files}{document_tokens(path)}".encode()).hexdigest()


def document_tokens(path: Path) -> tuple[str | None, str | None]:
    """The tokens that begin and end documents unless a source says otherwise: those that tokenizer_config.json states.

    The folders of Llama 3's chat models state the end of a turn; the end of a text takes its place.
    """
    bos, eos = stated_tokens(path)
    return bos, END_OF_TEXT if eos in TURN_ENDS else eos


def stated_tokens(path: Path) -> tuple[str | None, str | None]:
    """bos_token and eos_token of the tokenizer_config.json beside a tokenizer.json; other files know their own."""
    config = tokenizer_config(path) if tokenizer_file(path).suffix == ".json" else {}
    return spelling(config.get("bos_token")), spelling(config.get("eos_token"))


def tokenizer_config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside the file that encodes; empty if there is none."""
    settings = tokenizer_file(path).with_name("tokenizer_config.json")
    config: dict[str, Any] = read_json(settings) if settings.is_file() else {}
    return config


def spelling(token: Any) -> str | None:
    """The text of a token that tokenizer_config.json gives as a string or as {"content": string}."""
    return token.get("content") if isinstance(token, dict) else token


def _tokenizer_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not files:
        raise BadInput(
            f"no tokenizer in {path}: it holds neither tokenizer.json nor tokenizer.model",
            fix="give a Hugging Face tokenizer folder, or run `octo data tokenizer RECIPE`",
        )
    return files


def _check_length(path: Path, length: int | None) -> None:
    if not path.is_file():
        raise BadInput(f"prepared data set {path.parent} lacks {path.name}", fix=f"copy it again, or {PREPARE}")
    if length is not None and path.stat().st_size != length:
        raise BadInput(
            f"{path} has {path.stat().st_size:,} bytes; the manifest says {length:,}",
            fix=f"copy it again, or {PREPARE}",
        )
