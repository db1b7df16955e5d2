"""A prepared data set is read only if it is whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_octo.data.manifest import read_manifest, tokenizer_sha256
from megatron_octo.errors import BadInput
from megatron_octo.rundir import DONE
from tests.prepared import write_source, write_tokenizer


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "web", write_tokenizer(tmp_path / "tokenizer"), seed=0, documents=20)


def test_a_missing_data_set_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere does not exist\n.*octo data prepare"):
        read_manifest(tmp_path / "nowhere")


def test_an_unfinished_data_set_is_refused(source):
    (source / DONE).unlink()
    with pytest.raises(BadInput, match="has no DONE"):
        read_manifest(source)


@pytest.mark.parametrize("name", ["00001.bin", "00000.idx"])
def test_a_data_set_that_lacks_a_file_is_refused(source, name):
    (source / name).unlink()
    with pytest.raises(BadInput, match=f"lacks {name}"):
        read_manifest(source)


def test_a_torn_shard_is_refused(source):
    path = source / "00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BadInput, match=r"00001\.bin has"):
        read_manifest(source)


def test_totals_that_contradict_the_shards_are_refused(source):
    text = (source / "manifest.json").read_text()
    tokens = f'"tokens": {read_manifest(source).tokens}'
    assert tokens in text
    (source / "manifest.json").write_text(text.replace(tokens, '"tokens": 5', 1))
    with pytest.raises(BadInput, match="5 tokens"):
        read_manifest(source)


def test_an_identity_changes_with_any_byte_that_training_reads(source):
    manifest = read_manifest(source)
    first, second = manifest.shards
    for field in ("bin_sha256", "idx_sha256", "loss_sha256"):
        assert replace(manifest, shards=(first, replace(second, **{field: "0"}))).identity != manifest.identity
    assert replace(manifest, shards=(second, first)).identity != manifest.identity
    assert replace(manifest, validation=(first,)).identity != manifest.identity
    assert replace(manifest, rejected=5, packages=("megatron_octo 9",)).identity == manifest.identity


def test_a_tokenizers_identity_is_that_of_its_two_files(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", "{}")
    first = tokenizer_sha256(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    assert tokenizer_sha256(folder) == first
    (folder / "tokenizer.model").write_text("m")
    second = tokenizer_sha256(folder)
    (folder / "tokenizer.json").unlink()
    third = tokenizer_sha256(folder)
    assert len({first, second, third}) == 3


def test_the_tokens_that_begin_and_end_documents_are_part_of_a_tokenizers_identity(tmp_path):
    def identity(config: dict) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tokenizer_sha256(tmp_path)

    write_tokenizer(tmp_path)
    base = identity({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    assert identity({"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}) == base
    assert len({base, identity({"bos_token": "<s>", "eos_token": "<pad>"}), identity({"eos_token": "</s>"})}) == 3
    assert identity({"eos_token": "<|eot_id|>"}) == identity({"eos_token": "<|end_of_text|>"})  # Llama 3's chat models
