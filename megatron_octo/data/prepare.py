"""Text records -> token ids on disk: one source, once, in Megatron's indexed format with a manifest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_octo import console
from megatron_octo.config.base import to_dict
from megatron_octo.config.data import PrepareConfig, Template
from megatron_octo.data.indexed import IndexedWriter, TokenType, token_type
from megatron_octo.data.manifest import (
    PREPARE,
    FileRecord,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    read_manifest,
    tokenizer_sha256,
    write_manifest,
)
from megatron_octo.data.read import check_input, read_records
from megatron_octo.data.templates import render
from megatron_octo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_octo.errors import BadInput
from megatron_octo.rundir import is_written, new_folder, sha256, write_json

BATCH_DOCUMENTS = 1000
SHARD_TOKENS = 1 << 30  # 2 or 4 GiB a file
MOST_REJECTED = 0.5


def prepare(config: PrepareConfig, *, shard_tokens: int = SHARD_TOKENS) -> Manifest:
    """Write the shards and the manifest of one source; a finished one is only read.

    Raises:
        BadInput: an input is missing, the tokenizer lacks a control id that is asked for, most records
            do not fit the template, or the output was made otherwise.
    """
    log = console.logger(__name__)
    if is_prepared(config):
        log.info("prepare %s: skipped, %s is there", config.name, config.output)
        return read_manifest(config.output)
    tokenizer = check(config)
    dtype = token_type(tokenizer.vocab_size)
    with new_folder(config.output) as folder:
        records = console.progress(read_records(config.input), total=None, title=f"prepare {config.name}")
        texts = _Texts(records, config.template)
        shards = _write_shards(folder, _tokenize(texts, config, tokenizer), dtype, shard_tokens)
        texts.check(config)
        manifest = Manifest(
            name=config.name,
            template=config.template,
            bos=config.bos,
            eos=config.eos,
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=texts.num_bytes,
            rejected=texts.rejected,
            dtype=dtype,
            tokenizer=TokenizerRecord(
                path=config.tokenizer,
                sha256=tokenizer.sha256,
                vocab_size=tokenizer.vocab_size,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
            ),
            sources=(
                FileRecord(path=config.input, size_bytes=config.input.stat().st_size, sha256=sha256(config.input)),
            ),
            shards=shards,
        )
        write_manifest(folder, manifest)
        write_json(folder / "config.json", to_dict(config))
    log.info(
        "prepare %s: %s documents, %s tokens (%.1f each), %s rejected",
        config.name,
        f"{manifest.documents:,}",
        f"{manifest.tokens:,}",
        manifest.tokens / manifest.documents,
        f"{manifest.rejected:,}",
    )
    return manifest


def is_prepared(config: PrepareConfig) -> bool:
    """Whether the output is there, made with these settings, this tokenizer and this input; changes nothing.

    The input may be gone by now; one that is still there must have its old length.

    Raises:
        BadInput: it was made otherwise.
    """
    if not is_written(config.output, to_dict(config)):
        return False
    manifest = read_manifest(config.output)
    if config.tokenizer.exists() and tokenizer_sha256(config.tokenizer) != manifest.tokenizer.sha256:
        raise BadInput(
            f"prepared data set {config.output} was made with another tokenizer than {config.tokenizer} holds now",
            fix=f"delete it and {PREPARE}",
        )
    for source in manifest.sources:
        if source.path.exists() and source.path.stat().st_size != source.size_bytes:
            raise BadInput(
                f"prepared data set {config.output} was made from {source.path} when that had {source.size_bytes:,} "
                f"bytes; it has {source.path.stat().st_size:,} now",
                fix=f"delete it and {PREPARE}",
            )
    return True


def check(config: PrepareConfig) -> Tokenizer:
    """Load the tokenizer of a source that is to be prepared; changes nothing.

    Raises:
        BadInput: the input or the tokenizer is missing, or the tokenizer lacks a control id that is asked for.
    """
    check_input(config.input)
    tokenizer = load_tokenizer(config.tokenizer)
    for name, wanted, index in (("bos", config.bos, tokenizer.bos_id), ("eos", config.eos, tokenizer.eos_id)):
        if wanted and index is None:
            raise BadInput(
                f"source {config.name} asks for {name}, and the tokenizer {config.tokenizer} has no {name}_token",
                fix=f"set {name}=False, or name the token in tokenizer_config.json",
            )
    return tokenizer


class _Texts:
    """The texts of records, counted while they are passed on."""

    def __init__(self, records: Iterable[object], template: Template) -> None:
        self._records, self._template = records, template
        self.documents = self.rejected = self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for record in self._records:
            text = render(self._template, record)
            if text is None:
                self.rejected += 1
            else:
                self.documents += 1
                self.num_bytes += len(text.encode())
                yield text

    def check(self, config: PrepareConfig) -> None:
        """Refuse a source that has no documents, or whose records mostly do not fit."""
        total = self.documents + self.rejected
        if not self.documents or self.rejected > MOST_REJECTED * total:
            raise BadInput(
                f"source {config.name}: {self.rejected:,} of {total:,} records in {config.input} do not fit "
                f"template {config.template}",
                fix="choose the template whose fields the records have, or correct the file",
            )


def _tokenize(texts: Iterable[str], config: PrepareConfig, tokenizer: Tokenizer) -> Iterator[list[int]]:
    before = [tokenizer.bos_id] if config.bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if config.eos and tokenizer.eos_id is not None else []
    for batch in itertools.batched(texts, BATCH_DOCUMENTS):
        for ids in tokenizer.encode_batch(batch):
            yield [*before, *ids, *after]


def _write_shards(
    folder: Path, documents: Iterator[list[int]], dtype: TokenType, shard_tokens: int
) -> tuple[ShardRecord, ...]:
    """Write 00000, 00001, ...; a shard ends with the document that fills it."""
    shards: list[ShardRecord] = []
    for first in documents:
        prefix = folder / f"{len(shards):05d}"
        with IndexedWriter(prefix, dtype) as writer:
            writer.add(first)
            while writer.tokens < shard_tokens and (ids := next(documents, None)) is not None:
                writer.add(ids)
        shards.append(
            ShardRecord(
                prefix=prefix.name,
                documents=writer.documents,
                tokens=writer.tokens,
                bin_sha256=sha256(folder / f"{prefix.name}.bin"),
                idx_sha256=sha256(folder / f"{prefix.name}.idx"),
            )
        )
    return tuple(shards)
