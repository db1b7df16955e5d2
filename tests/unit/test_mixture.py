"""Manifests and weights become shards with shares; what does not fit is refused before torch loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.config.data import MixtureConfig
from megatron_octo.data.manifest import read_manifest, write_manifest
from megatron_octo.data.mixture import read_held_out, read_mixture
from megatron_octo.errors import BadInput
from tests.prepared import VOCAB, hold_out, stage, write_data, write_source, write_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The prepared data of `stage`."""
    write_data(tmp_path)
    return tmp_path


def test_a_sources_weight_is_shared_among_its_shards_by_their_tokens(data):
    mixture = read_mixture(stage(data, "x").data, model_vocab_size=VOCAB)
    for source, weight in enumerate((0.7, 0.3)):
        shards = [shard for shard in mixture.shards if shard.source == source]
        assert len(shards) == 2
        assert sum(shard.weight for shard in shards) == pytest.approx(weight, abs=1e-12)
        sizes = [shard.prefix.with_suffix(".bin").stat().st_size for shard in shards]
        assert shards[0].weight / shards[1].weight == pytest.approx(sizes[0] / sizes[1])


def test_a_missing_data_set_is_named_with_the_command_that_makes_it(data):
    (data / "b" / "DONE").unlink()
    with pytest.raises(BadInput, match=r"b is not finished.*\n.*octo data prepare"):
        read_mixture(stage(data, "x").data, model_vocab_size=VOCAB)


def test_more_ids_than_the_model_has_rows_are_refused(data):
    with pytest.raises(BadInput, match=r"64 ids.*vocab_size is 63"):
        read_mixture(stage(data, "x").data, model_vocab_size=63)


def test_a_source_of_another_tokenizer_is_refused(data):
    other = write_tokenizer(data / "other", content='{"other": 1}')
    write_source(data / "c", other, seed=2)
    config = stage(data, "x").data
    mixed = replace(config, sources=(config.sources[0], replace(config.sources[1], path=data / "c")))
    with pytest.raises(BadInput, match=r"c was prepared with another tokenizer"):
        read_mixture(mixed, model_vocab_size=VOCAB)


def _first(data: Path, **changes: Any) -> MixtureConfig:
    config = stage(data, "x").data
    return replace(config, sources=(replace(config.sources[0], **changes), *config.sources[1:]))


def _change_manifest(folder: Path, **changes: Any) -> None:
    write_manifest(folder, replace(read_manifest(folder), **changes))


@pytest.fixture
def marked(data: Path) -> Path:
    """The prepared data of `stage`, source a with marks."""
    shards = read_manifest(data / "a").shards
    for shard in shards:
        (data / "a" / f"{shard.prefix}.loss").write_bytes(bytes(shard.tokens))
    _change_manifest(data / "a", shards=tuple(replace(shard, loss_sha256="0") for shard in shards))
    return data


def test_shards_say_which_tokens_count(marked):
    mixture = read_mixture(_first(marked, loss="answers"), model_vocab_size=VOCAB)
    assert [shard.loss for shard in mixture.shards] == ["answers", "answers", "all", "all"]


def test_loss_on_answers_without_marks_is_refused(data):
    with pytest.raises(BadInput, match=r"source a has loss 'answers'.*lacks.*00000\.loss\n.*mark_answers"):
        read_mixture(_first(data, loss="answers"), model_vocab_size=VOCAB)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"1")])
def test_damaged_marks_are_refused(damage, marked):
    damage(marked / "a" / "00001.loss")
    read_mixture(_first(marked), model_vocab_size=VOCAB)  # nothing reads them
    with pytest.raises(BadInput, match=r"00001\.loss"):
        read_mixture(_first(marked, loss="answers"), model_vocab_size=VOCAB)


def test_one_data_set_with_both_kinds_of_loss_is_refused(marked):
    config = stage(marked, "x").data
    a, b = config.sources
    twice = replace(config, sources=(a, replace(b, path=a.path, loss="answers")))
    with pytest.raises(BadInput, match=r"a is in data\.sources with loss 'all' and with loss 'answers'"):
        read_mixture(twice, model_vocab_size=VOCAB)


def test_documents_that_end_with_different_ids_cannot_be_cut(data):
    record = replace(read_manifest(data / "b").tokenizer, eos_token="<|eot_id|>", eos_id=5)
    _change_manifest(data / "b", tokenizer=record)
    config = stage(data, "x").data
    read_mixture(config, model_vocab_size=VOCAB)
    with pytest.raises(BadInput, match=r"documents of .*a end with </s>, those of .*b with <\|eot_id\|>"):
        read_mixture(replace(config, across_documents=False), model_vocab_size=VOCAB)


def test_documents_without_an_end_cannot_be_cut(data):
    _change_manifest(data / "b", config=replace(read_manifest(data / "b").config, eos=False))
    config = stage(data, "x").data
    read_mixture(config, model_vocab_size=VOCAB)
    with pytest.raises(BadInput, match=r"across_documents is off, but the documents of .*b do not end.*\n.*eos"):
        read_mixture(replace(config, across_documents=False), model_vocab_size=VOCAB)


def test_what_a_source_holds_out_is_a_mixture_of_its_own(data):
    config = stage(data, "x").data
    write_source(data / "other", data / "tokenizer", seed=5)
    hold_out(data / "b", data / "other")
    mixture = read_mixture(config, model_vocab_size=VOCAB)
    held_out = read_held_out(config, mixture)
    assert list(held_out) == ["b"]
    assert held_out["b"].tokens == (read_manifest(data / "other").tokens,)
    assert sum(shard.weight for shard in held_out["b"].shards) == pytest.approx(1.0)
    prefixes = [data / "b" / "validation00000", data / "b" / "validation00001"]
    assert [shard.prefix for shard in held_out["b"].shards] == prefixes
    assert held_out["b"].eos_id == mixture.eos_id


def test_a_mixture_that_holds_nothing_out_cannot_be_validated(data):
    config = stage(data, "x").data
    with pytest.raises(BadInput, match=r"no source in data\.sources holds out a sequence\n.*validation_share"):
        read_held_out(config, read_mixture(config, model_vocab_size=VOCAB))


def test_held_out_shards_are_looked_at_and_their_marks_too(data):
    write_source(data / "other", data / "tokenizer", seed=5)
    hold_out(data / "a", data / "other")
    config = _first(data, loss="answers")
    mixture = read_mixture(stage(data, "x").data, model_vocab_size=VOCAB)
    with pytest.raises(BadInput, match=r"lacks .*validation00000\.loss"):
        read_held_out(config, mixture)
    (data / "a" / "validation00001.bin").unlink()
    with pytest.raises(BadInput, match=r"a lacks validation00001\.bin"):
        read_manifest(data / "a")
