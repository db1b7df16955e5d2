"""Several prepared data sets as one: their shards, numbered anew, under one manifest."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_octo import console
from megatron_octo.data.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from megatron_octo.data.prepare import VALIDATION
from megatron_octo.data.shards import SHARD_FILES
from megatron_octo.errors import BadInput
from megatron_octo.rundir import new_folder

ALIKE = ("template", "bos", "eos", "dtype")


def merge(output: Path, folders: Sequence[Path], *, name: str) -> Manifest:
    """Write `output` from the shards of `folders`, in their order. On one file system the files are linked, not copied.

    Raises:
        BadInput: a folder holds no whole data set, they were prepared differently, or `output` exists.
    """
    if output.exists():
        raise BadInput(f"output {output} exists", fix="choose another folder, or delete this one")
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        _check_alike(folders[0], manifests[0], folder, manifest)
    total = sum(len(each.shards) + len(each.validation) for each in manifests)
    with new_folder(output) as out, console.meter(f"merge {name}", total) as show:
        shards: list[ShardRecord] = []
        validation: list[ShardRecord] = []
        for folder, manifest in zip(folders, manifests, strict=True):
            for records, prefix, into in ((manifest.shards, "", shards), (manifest.validation, VALIDATION, validation)):
                for shard in records:
                    into.append(_take(folder, shard, out, f"{prefix}{len(into):05d}"))
                    show(1, into[-1].prefix)
        merged = _merged(name, manifests, shards, validation)
        write_manifest(out, merged)
    return merged


def _take(folder: Path, shard: ShardRecord, out: Path, prefix: str) -> ShardRecord:
    for ending in SHARD_FILES:
        source, target = folder / f"{shard.prefix}{ending}", out / f"{prefix}{ending}"
        if source.is_file():
            try:
                os.link(source, target)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, target)
    return replace(shard, prefix=prefix)


def _merged(
    name: str, manifests: Sequence[Manifest], shards: Sequence[ShardRecord], validation: Sequence[ShardRecord]
) -> Manifest:
    controls: Counter[str] = Counter()
    for each in manifests:
        controls.update(dict(each.control_texts))
    return replace(
        manifests[0],
        name=name,
        documents=sum(each.documents for each in manifests),
        tokens=sum(each.tokens for each in manifests),
        text_bytes=sum(each.text_bytes for each in manifests),
        rejected=sum(each.rejected for each in manifests),
        filtered=sum(each.filtered for each in manifests),
        control_texts=tuple(sorted(controls.items())),
        sources=tuple(source for each in manifests for source in each.sources),
        shards=tuple(shards),
        validation=tuple(validation),
    )


def _check_alike(first: Path, one: Manifest, folder: Path, other: Manifest) -> None:
    pairs = [(field, getattr(one, field), getattr(other, field)) for field in ALIKE]
    pairs.append(("tokenizer", one.tokenizer.sha256[:12], other.tokenizer.sha256[:12]))
    for field in ("bos_token", "eos_token"):
        pairs.append((field, getattr(one.tokenizer, field), getattr(other.tokenizer, field)))
    marked, others = (all(shard.loss_sha256 for shard in each.shards) for each in (one, other))
    pairs.append(("mark_answers", marked, others))
    differing = [f"{field} {a!r} and {b!r}" for field, a, b in pairs if a != b]
    if differing:
        raise BadInput(
            f"{first} and {folder} were prepared differently: {'; '.join(differing)}",
            fix="prepare them with the same settings; different sources are mixed by a recipe, not merged",
        )
