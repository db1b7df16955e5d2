"""Manifests and weights -> what training reads: shards with their shares. Checks everything; loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.data.manifest import PREPARE, Manifest, ShardRecord, read_manifest, tokenizer_sha256
from megatron_octo.errors import BadInput

if TYPE_CHECKING:
    from megatron_octo.config.data import Loss, MixtureConfig, SourceConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One .bin/.idx pair in a mixture."""

    prefix: Path
    """Path without .bin and .idx."""
    weight: float
    """Share of the stage's tokens."""
    source: int
    """Index of its source."""
    loss: Loss = "all"
    """Which tokens are learned from: all, or those marked in PREFIX.loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Prepared sources, weighed."""

    names: tuple[str, ...]
    """The sources."""
    tokens: tuple[int, ...]
    """Tokens in each source's data set."""
    identities: tuple[tuple[str, str], ...]
    """(source, `Manifest.identity` of its data set): what a save notes, and a part of the index cache's key."""
    shards: tuple[Shard, ...]
    """All sources' shards; their weights sum to 1."""
    tokenizer_sha256: str
    """The tokenizer that made them all."""
    vocab_size: int
    """Ids are below this."""
    eos_id: int | None
    """The id that ends a document."""


def read_mixture(config: MixtureConfig, *, model_vocab_size: int) -> Mixture:
    """Read and check the manifests of a mixture. A source's weight is shared among its shards by their tokens.

    Raises:
        BadInput: a data set is missing or unfinished, was prepared with another tokenizer, or has no tokens; the
            tokenizer has more ids than the model has rows; a source with loss on answers has no marks of them;
            documents are to be cut and do not all end with one id; a data set is in it with both kinds of loss.
    """
    manifests = [read_manifest(source.path) for source in config.sources]
    wanted = tokenizer_sha256(config.tokenizer)
    for source, manifest in zip(config.sources, manifests, strict=True):
        _check(source.path, manifest, wanted, config.tokenizer, model_vocab_size)
        _check_masks(source, manifest, across_documents=config.across_documents)
    _check_same_loss(config.sources)
    if not config.across_documents:
        _check_same_end(config.sources, manifests)
    return Mixture(
        names=tuple(source.name for source in config.sources),
        tokens=tuple(manifest.tokens for manifest in manifests),
        identities=tuple((s.name, m.identity) for s, m in zip(config.sources, manifests, strict=True)),
        shards=tuple(
            shard
            for index, (source, manifest) in enumerate(zip(config.sources, manifests, strict=True))
            for shard in _shards(source, manifest.shards, weight=source.weight, index=index)
        ),
        tokenizer_sha256=wanted,
        vocab_size=max(manifest.tokenizer.vocab_size for manifest in manifests),
        eos_id=manifests[0].tokenizer.eos_id,
    )


def check_unchanged(mixture: Mixture, read: Sequence[tuple[str, str]], save: Path) -> None:
    """Refuse to go on from a save if a source that it `read` (as `Mixture.identities`) holds something else by now.

    Raises:
        BadInput: so it is.
    """
    for name, identity in mixture.identities:
        if name in dict(read) and (name, identity) not in read:
            raise BadInput(
                f"the data set of source {name} was prepared anew since {save}: going on would read other sequences",
                fix="put the old one back, or begin a run of another name (--name)",
            )


def read_held_out(config: MixtureConfig, mixture: Mixture) -> dict[str, Mixture]:
    """The validation shards of each source in a mixture that was read, as mixtures of their own.

    Sources that hold out less than a sequence are left out.

    Raises:
        BadInput: no source holds out any; or a shard's marks of answers are missing.
    """
    held_out = {}
    for source in config.sources:
        shards = read_manifest(source.path).validation
        tokens = sum(shard.tokens for shard in shards)
        if tokens > config.seq_length:  # a sequence needs the token after it
            _check_marks(source, shards)
            held_out[source.name] = replace(
                mixture, names=(source.name,), tokens=(tokens,), shards=tuple(_shards(source, shards))
            )
    if not held_out:
        raise BadInput(
            "validate.every_steps is set, but no source in data.sources holds out a sequence",
            fix="prepare one again with validation_share (`octo data prepare`), or leave validate.every_steps out",
        )
    return held_out


def _shards(
    source: SourceConfig, records: Sequence[ShardRecord], *, weight: float = 1.0, index: int = 0
) -> Iterator[Shard]:
    """The shards that have tokens, with their parts of `weight`."""
    tokens = sum(record.tokens for record in records)
    for record in records:
        if record.tokens > 0:
            yield Shard(
                prefix=source.path / record.prefix,
                weight=weight * record.tokens / tokens,
                source=index,
                loss=source.loss,
            )


def _check(folder: Path, manifest: Manifest, wanted: str, tokenizer: Path, model_vocab_size: int) -> None:
    if manifest.tokenizer.sha256 != wanted:
        raise BadInput(
            f"data set {folder} was prepared with another tokenizer ({manifest.config.tokenizer}, "
            f"{manifest.tokenizer.sha256[:12]}) than data.tokenizer {tokenizer} ({wanted[:12]})",
            fix="prepare it again with this tokenizer (`octo data prepare`), or correct data.tokenizer",
        )
    if manifest.tokenizer.vocab_size > model_vocab_size:
        raise BadInput(
            f"the tokenizer {tokenizer} has {manifest.tokenizer.vocab_size:,} ids, but model.vocab_size is "
            f"{model_vocab_size:,}",
            fix="enlarge model.vocab_size, or use the model's own tokenizer",
        )
    if manifest.tokens == 0:
        raise BadInput(f"data set {folder} holds no tokens", fix="leave the source out, or prepare it from other text")


def _check_masks(source: SourceConfig, manifest: Manifest, *, across_documents: bool) -> None:
    if not across_documents and (not manifest.config.eos or manifest.tokenizer.eos_id is None):
        raise BadInput(
            f"data.across_documents is off, but the documents of {source.path} do not end with an end-of-text id",
            fix="prepare it again with eos on (`octo data prepare`), or leave data.across_documents on",
        )
    _check_marks(source, manifest.shards)


def _check_marks(source: SourceConfig, shards: Sequence[ShardRecord]) -> None:
    if source.loss == "all":
        return
    for shard in shards:
        path = source.path / f"{shard.prefix}.loss"
        if shard.loss_sha256 is None or not path.is_file():
            raise BadInput(
                f"source {source.name} has loss {source.loss!r}, but its data set lacks {path}",
                fix="prepare it again with mark_answers on (`octo data prepare`), or give the source loss 'all'",
            )
        if path.stat().st_size != shard.tokens:
            raise BadInput(
                f"{path} has {path.stat().st_size:,} bytes; its shard has {shard.tokens:,} tokens",
                fix=f"copy it again, or {PREPARE}",
            )


def _check_same_end(sources: Sequence[SourceConfig], manifests: Sequence[Manifest]) -> None:
    first = manifests[0].tokenizer
    for source, manifest in zip(sources, manifests, strict=True):
        if manifest.tokenizer.eos_id != first.eos_id:
            raise BadInput(
                f"data.across_documents is off, but documents of {sources[0].path} end with {first.eos_token}, "
                f"those of {source.path} with {manifest.tokenizer.eos_token}",
                fix="prepare both with the same eos_token (`octo data prepare`), or leave data.across_documents on",
            )


def _check_same_loss(sources: tuple[SourceConfig, ...]) -> None:
    losses = {source.path: source.loss for source in sources}
    for source in sources:
        if losses[source.path] != source.loss:
            raise BadInput(
                f"the data set {source.path} is in data.sources with loss 'all' and with loss 'answers'",
                fix="name it once, or copy it to another folder",
            )
