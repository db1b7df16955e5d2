"""Several prepared data sets as one: their shards, numbered anew, under one manifest."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_octo import console
from megatron_octo.config.base import to_dict
from megatron_octo.data.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from megatron_octo.data.prepare import REJECTED, VALIDATION
from megatron_octo.data.shards import SHARD_FILES
from megatron_octo.errors import BadInput
from megatron_octo.rundir import differences, new_folder

# settings that say where records are, where pieces and shards end, or what stops: they change no document
MAY_DIFFER = (
    "name",
    "input",
    "hub",
    "facts",
    "output",
    "bos_token",  # which token it is says the tokenizer's record
    "eos_token",
    "on_bad_record",
    "most_bad_share",
    "piece_bytes",
    "shard_tokens",
)


def merge(output: Path, folders: Sequence[Path], *, name: str) -> Manifest:
    """Write `output` from the shards of `folders`, in their order. On one file system the files are linked, not copied.

    Raises:
        BadInput: a folder holds no whole data set or is named twice, they were prepared differently, or `output`
            exists.
    """
    if output.exists():
        raise BadInput(f"output {output} exists", fix="choose another folder, or delete this one")
    for folder, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise BadInput(
                f"{folder} is named {count} times", fix="name it once; a recipe's weights say what is read how often"
            )
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
        _join_rejected(out, folders)
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


def _join_rejected(out: Path, folders: Sequence[Path]) -> None:
    paths = [folder / REJECTED for folder in folders if (folder / REJECTED).is_file()]
    if paths:
        with (out / REJECTED).open("wb") as into:
            for path in paths:
                with path.open("rb") as file:
                    shutil.copyfileobj(file, into)


def _merged(
    name: str, manifests: Sequence[Manifest], shards: Sequence[ShardRecord], validation: Sequence[ShardRecord]
) -> Manifest:
    controls: Counter[str] = Counter()
    for each in manifests:
        controls.update(dict(each.control_texts))
    return replace(
        manifests[0],
        config=replace(manifests[0].config, name=name),
        packages=tuple(sorted({package for each in manifests for package in each.packages})),
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
    found = [each for each in differences(_settings(one), _settings(other)) if each[0].split(".")[0] not in MAY_DIFFER]
    if found:
        raise BadInput(
            f"{first} and {folder} were prepared differently: {'; '.join(f'{n} {a!r} and {b!r}' for n, a, b in found)}",
            fix="prepare them with the same settings; different sources are mixed by a recipe, not merged",
        )


def _settings(manifest: Manifest) -> dict[str, Any]:
    """What it was made with; of the tokenizer, what it is and not where it was."""
    return {**to_dict(manifest.config), "tokenizer": to_dict(manifest.tokenizer)}
