"""Is a prepared data set what its manifest says? Reads every byte; finds all that is wrong, not only the first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_octo import console
from megatron_octo.config.base import read_settings
from megatron_octo.data.indexed import HEADER, index_parts, read_lengths
from megatron_octo.data.manifest import FILE, PREPARE, TOKEN_BYTES, Manifest, ShardRecord
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.rundir import is_done, sha256

BLOCK_IDS = 1 << 24


def verify(folder: Path) -> Manifest:
    """The manifest of a prepared data set that is whole.

    Raises:
        BadInput: `folder` holds no finished data set.
        VerificationError: a file is missing, truncated or changed, an index does not fit its ids, or an id is beyond
            the vocabulary; the message lists everything found.
    """
    if not is_done(folder) or not (folder / FILE).exists():
        raise BadInput(f"{folder} holds no finished data set", fix=PREPARE)
    manifest = read_settings(Manifest, folder / FILE)
    shards = (*manifest.shards, *manifest.validation)
    found: list[str] = []
    with console.meter(f"verify {manifest.config.name}", sum(shard.tokens for shard in shards)) as show:
        for shard in shards:
            found += _wrong(folder, shard, manifest)
            show(shard.tokens, shard.prefix)
    if found:
        lines = "\n".join(f"  {each}" for each in found)
        raise VerificationError(
            f"data set {folder} is damaged:\n{lines}", fix=f"copy it again; or delete it and {PREPARE}"
        )
    return manifest


def _wrong(folder: Path, shard: ShardRecord, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a shard, a sentence each."""
    lengths = {
        ".bin": shard.tokens * TOKEN_BYTES[manifest.dtype],
        ".idx": HEADER.size + shard.documents * (4 + 8) + (shard.documents + 1) * 8,
        ".loss": shard.tokens if shard.loss_sha256 else None,
        ".ids": None,
    }
    hashes = {".bin": shard.bin_sha256, ".idx": shard.idx_sha256, ".loss": shard.loss_sha256, ".ids": shard.ids_sha256}
    whole = True
    for ending, wanted in hashes.items():
        path, length = folder / f"{shard.prefix}{ending}", lengths[ending]
        if wanted is None:
            continue
        if not path.is_file():
            yield f"{path.name} is missing"
        elif length is not None and path.stat().st_size != length:
            size = path.stat().st_size
            yield f"{path.name} has {size:,} bytes instead of {length:,}: {'truncated' if size < length else 'longer'}"
        elif sha256(path) != wanted:
            yield f"{path.name} was changed: its hash is not the manifest's"
            continue
        else:
            continue
        whole = whole and ending not in (".bin", ".idx")
    if whole:
        yield from _wrong_content(folder, shard, manifest)


def _wrong_content(folder: Path, shard: ShardRecord, manifest: Manifest) -> Iterator[str]:
    """What is wrong inside of .idx and .bin files that have the right lengths."""
    prefix = folder / shard.prefix
    try:
        lengths, dtype = read_lengths(prefix)
    except BadInput as error:
        yield error.what
        return
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    counted = _counts(len(lengths), int(lengths.sum(dtype=np.int64)), dtype.name)
    stated = _counts(shard.documents, shard.tokens, manifest.dtype)
    if counted != stated or (lengths < 0).any():
        yield f"{prefix.name}.idx counts {counted} instead of {stated}"
        return
    with prefix.with_name(f"{prefix.name}.idx").open("rb") as file:
        if any(file.read(len(part)) != part for part in index_parts(lengths, dtype)):
            yield f"{prefix.name}.idx has wrong offsets or document bounds"
            return
    ids = np.memmap(prefix.with_name(f"{prefix.name}.bin"), dtype, "r") if shard.tokens else np.empty(0, dtype)
    for start in range(0, len(ids), BLOCK_IDS):
        block = ids[start : start + BLOCK_IDS]
        beyond = np.flatnonzero((block >= manifest.tokenizer.vocab_size) | (block < 0))
        if len(beyond):
            at, value = start + int(beyond[0]), int(block[beyond[0]])
            number = int(np.searchsorted(ends, at, side="right"))
            size = manifest.tokenizer.vocab_size
            yield f"{shard.prefix}.bin has the id {value:,}, beyond the vocabulary of {size:,}, in document {number:,}"
            break
    tokenizer = manifest.tokenizer
    for wanted, places, index_id, what in (
        (manifest.config.bos, starts, tokenizer.bos_id, "begin with the beginning-of-text id"),
        (manifest.config.eos, ends - 1, tokenizer.eos_id, "end with the end-of-text id"),
    ):
        if wanted and index_id is not None and len(places):
            count = int((ids[places] != index_id).sum())
            if count:
                yield f"{shard.prefix}.bin: {count:,} documents do not {what}"


def _counts(documents: int, tokens: int, dtype: str) -> str:
    return f"{documents:,} documents, {tokens:,} tokens of {dtype}"
