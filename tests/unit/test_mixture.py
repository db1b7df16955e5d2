"""Manifests and weights become shards with shares; what does not fit is refused before torch loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo.data.mixture import read_mixture
from megatron_octo.errors import BadInput
from tests.prepared import VOCAB, stage, write_data, write_source, write_tokenizer


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
