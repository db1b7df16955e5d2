"""What a prepared data set says about itself: `manifest.json` beside the shards.

Training reads it before torch loads: how many tokens there are, which tokenizer made them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_octo.config.base import Settings, read_settings, require, to_dict
from megatron_octo.config.data import Template
from megatron_octo.errors import BadInput
from megatron_octo.rundir import is_done, sha256, write_json

FILE = "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
TOKEN_BYTES = {"uint16": 2, "int32": 4}
PREPARE = "run `octo data prepare RECIPE` with the recipe that holds this source"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord(Settings):
    """A text file that was read."""

    path: Path
    """Where it was."""
    size_bytes: int
    """Its length, as stored (compressed, if it is)."""
    sha256: str
    """Hash of its bytes, as stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecord(Settings):
    """The tokenizer that made the ids."""

    path: Path
    """Its folder, when the data set was prepared."""
    sha256: str
    """`tokenizer_sha256` of that folder: what two data sets must share to be mixed."""
    vocab_size: int
    """Ids are below this."""
    bos_id: int | None
    """The beginning-of-text id, None if the tokenizer has none."""
    eos_id: int | None
    """The end-of-text id, None if the tokenizer has none."""


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

    version: Literal[1] = 1
    """Version of this file's format."""
    name: str
    """The source's name."""
    template: Template
    """How a record became text."""
    bos: bool
    """Whether documents begin with the beginning-of-text id."""
    eos: bool
    """Whether documents end with the end-of-text id."""
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
                f"manifest of {self.name}: {total:,} {field}, but {parts:,} in its shards",
                fix=f"{PREPARE}; the file was changed by hand",
            )

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
    over the one file given.

    Raises:
        BadInput: `path` holds neither.
    """
    return hashlib.sha256(
        "".join(f"{each.name} {sha256(each)}\n" for each in _tokenizer_files(path)).encode()
    ).hexdigest()


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
