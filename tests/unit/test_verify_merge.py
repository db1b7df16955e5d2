"""`verify` finds every damage; `merge` adds up; `mix` refuses what repeats too often."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_octo.config.data import MixtureConfig, PrepareConfig, SourceConfig
from megatron_octo.data.indexed import HEADER, read_documents
from megatron_octo.data.manifest import read_manifest, write_manifest
from megatron_octo.data.merge import merge
from megatron_octo.data.mix import check_repeats, plan
from megatron_octo.data.prepare import REJECTED, prepare
from megatron_octo.data.verify import verify
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.rundir import sha256


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> PrepareConfig:
    rows = [{"question": f"{number}+1?", "answer": str(number + 1), "id": number} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(
        name="a",
        input=tmp_path / "a.jsonl",
        template="question_answer",
        tokenizer=tokenizer_folder,
        output=tmp_path / "a",
        mark_answers=True,
        id_column="id",
        validation_share=0.2,
        shard_tokens=300,
        piece_bytes=300,
    )
    prepare(config, num_workers=1)
    return config


def change(path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


def with_hashes_of_the_files(folder) -> None:
    """Let the manifest agree with what the files hold now: only their content can give the damage away."""
    manifest = read_manifest(folder)
    shards = tuple(
        replace(
            shard,
            bin_sha256=sha256(folder / f"{shard.prefix}.bin"),
            idx_sha256=sha256(folder / f"{shard.prefix}.idx"),
        )
        for shard in manifest.shards
    )
    write_manifest(folder, replace(manifest, shards=shards))


def test_a_whole_data_set_is_found_whole(config):
    assert verify(config.output) == read_manifest(config.output)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("00001.bin", lambda p: p.write_bytes(p.read_bytes()[:-2]), r"00001\.bin has .* truncated"),
        ("00000.idx", lambda p: p.write_bytes(p.read_bytes()[:-8]), r"00000\.idx has .* truncated"),
        ("00000.bin", lambda p: change(p, 10, b"\x05"), r"00000\.bin was changed"),
        ("00000.idx", lambda p: change(p, HEADER.size, b"\x01"), r"00000\.idx was changed"),
        ("00000.loss", lambda p: change(p, 3, b"\x07"), r"00000\.loss was changed"),
        ("00000.loss", lambda p: p.write_bytes(b""), r"00000\.loss has 0 bytes"),
        ("00001.ids", lambda p: p.write_bytes(p.read_bytes() + b"1\n"), r"00001\.ids was changed"),
        ("validation_00000.bin", lambda p: p.unlink(), r"validation_00000\.bin is missing"),
    ],
)
def test_damage_is_found(config, name, damage, message):
    damage(config.output / name)
    with pytest.raises(VerificationError, match=message):
        verify(config.output)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("00000.bin", 4, np.uint16(384).tobytes(), r"id 384, beyond the vocabulary of 384, in document 0"),
        ("00000.bin", 0, np.uint16(9).tobytes(), r"1 documents do not begin with the beginning-of-text id"),
        ("00000.idx", 9, struct.pack("<Q", 2), r"00000\.idx is no index of Megatron's"),
        ("00000.idx", 17, struct.pack("<B", 4), r"tokens of int32 instead of .* tokens of uint16"),
        ("00000.idx", 26, struct.pack("<Q", 9), "wrong offsets or document bounds"),
        ("00000.idx", HEADER.size, struct.pack("<i", 1), r"counts .* tokens of uint16 instead of"),
    ],
)
def test_wrong_content_is_found_even_where_the_hashes_agree(config, name, at, value, message):
    change(config.output / name, at, value)
    with_hashes_of_the_files(config.output)
    with pytest.raises(VerificationError, match=message):
        verify(config.output)


def test_all_damage_is_listed(config):
    for name in ("00000.bin", "00001.idx"):
        change(config.output / name, 30, b"\xff")
    with pytest.raises(VerificationError, match=r"00000\.bin was changed[\s\S]*00001\.idx was changed"):
        verify(config.output)


def test_an_unfinished_data_set_is_bad_input(config):
    (config.output / "DONE").unlink()
    with pytest.raises(BadInput, match="holds no finished data set"):
        verify(config.output)


def documents(folder) -> list[list[int]]:
    return [ids for prefix in read_manifest(folder).prefixes(folder) for ids in read_documents(prefix, 10**6)]


def test_merged_data_sets_hold_all_documents_and_verify(config, tmp_path):
    other = replace(config, output=tmp_path / "b", name="b")
    prepare(other, num_workers=1)
    merged = merge(tmp_path / "both", [config.output, other.output], name="both")
    assert verify(tmp_path / "both") == merged
    assert documents(tmp_path / "both") == documents(config.output) + documents(other.output)
    one = read_manifest(config.output)
    assert merged.tokens == 2 * one.tokens
    assert len(merged.validation) == 2 * len(one.validation)
    assert [shard.prefix for shard in merged.shards] == [f"{at:05d}" for at in range(2 * len(one.shards))]


def test_data_sets_prepared_differently_are_not_merged(config, tmp_path):
    other = replace(config, output=tmp_path / "b", bos=False, eos_token="<pad>", mark_answers=False)
    prepare(other, num_workers=1)
    with pytest.raises(
        BadInput, match=r"bos True and False; mark_answers True and False; .*eos_token '</s>' and '<pad>'"
    ):
        merge(tmp_path / "both", [config.output, other.output], name="both")
    assert not (tmp_path / "both").exists()
    with pytest.raises(BadInput, match="exists"):
        merge(config.output, [other.output], name="b")


def with_settings(config, folder, **changes):
    """A copy of a data set whose manifest has other settings."""
    shutil.copytree(config.output, folder)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, config=replace(manifest.config, **changes)))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"template": "format", "format_string": "{question}", "mark_answers": False}, "format_string '' and '{ques"),
        ({"columns": (("question", "problem"),)}, r"columns \[\] and \[\['question', 'problem'\]\]"),
        ({"template": "chat", "chat_models": ("gpt-4",)}, r"chat_models \[\] and \['gpt-4'\]"),
        ({"control_text": "bad"}, "control_text 'ordinary' and 'bad'"),
        ({"validation_share": 0.1}, r"validation_share 0\.2 and 0\.1"),
        ({"id_column": None}, "id_column 'id' and None"),
    ],
)
def test_every_setting_that_changes_documents_must_be_alike(config, tmp_path, changes, named):
    other = with_settings(config, tmp_path / "b", **changes)
    with pytest.raises(BadInput, match=named):
        merge(tmp_path / "both", [config.output, other], name="both")


def test_settings_that_change_no_document_may_differ(config, tmp_path):
    changes = {"name": "b", "piece_bytes": 1, "shard_tokens": 1, "on_bad_record": "skip", "tokenizer": tmp_path / "t"}
    other = with_settings(config, tmp_path / "b", **changes)
    merged = merge(tmp_path / "both", [config.output, other], name="both")
    assert merged.config == replace(config, name="both", output=Path())


def test_data_sets_of_two_tokenizers_are_not_merged(config, tmp_path):
    other = with_settings(config, tmp_path / "b")
    manifest = read_manifest(other)
    write_manifest(other, replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="0" * 64)))
    with pytest.raises(BadInput, match=r"tokenizer\.sha256 '.*' and '0000"):
        merge(tmp_path / "both", [config.output, other], name="both")


def test_a_folder_is_merged_once(config, tmp_path):
    twice = [config.output, config.output.parent / "." / "x" / ".." / config.output.name]
    with pytest.raises(BadInput, match="a is named 2 times"):
        merge(tmp_path / "both", twice, name="both")


def test_a_merged_manifest_names_the_packages_of_all(config, tmp_path):
    other = with_settings(config, tmp_path / "b")
    write_manifest(other, replace(read_manifest(other), packages=("megatron_octo 0.0.9",)))
    merged = merge(tmp_path / "both", [config.output, other], name="both")
    assert set(merged.packages) == {"megatron_octo 0.0.9", *read_manifest(config.output).packages}


def test_merged_data_sets_keep_the_records_that_were_left_out(config, tmp_path):
    config = replace(config, on_bad_record="skip", most_bad_share=0.5)
    folders = []
    for name in ("x", "y"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text((tmp_path / "a.jsonl").read_text() + f'{{"question": "{name}"}}\n')
        folders.append(tmp_path / name)
        prepare(replace(config, input=path, output=folders[-1]), num_workers=1)
    merged = merge(tmp_path / "both", folders, name="both")
    lines = (tmp_path / "both" / REJECTED).read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == [str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")]
    assert merged.rejected == 2
    assert verify(tmp_path / "both") == merged


def mixture(**options) -> MixtureConfig:
    sources = (
        SourceConfig(name="web", path="web", weight=0.9),
        SourceConfig(name="qa", path="qa", weight=0.1, **options),
    )
    return MixtureConfig(sources=sources, tokenizer="t", seq_length=100)


def test_a_plan_counts_tokens_sequences_and_epochs():
    web, qa = plan(mixture(), available=[10_000, 500], train_tokens=20_000)
    assert (web.tokens, web.sequences, web.epochs) == (18_000, 180, 1.8)
    assert (qa.tokens, qa.sequences, qa.epochs) == (2_000, 20, 4.0)
    check_repeats([web, qa])


def test_a_source_that_repeats_too_often_is_refused_with_the_arithmetic():
    plans = plan(mixture(), available=[10_000, 400], train_tokens=20_000)
    message = r"weight 0\.1 x 20,000 tokens = 2,000 of 400 available = 5\.00 epochs, more than max_epochs 4"
    with pytest.raises(BadInput, match=message) as error:
        check_repeats(plans)
    assert "0.08 or less" in error.value.fix
    check_repeats(plan(mixture(max_epochs=5), available=[10_000, 400], train_tokens=20_000))
