"""Text to ids on disk: every document, in order, once; what does not fit is counted or refused."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.indexed import IndexedWriter, read_documents, token_type
from megatron_octo.data.manifest import read_manifest
from megatron_octo.data.prepare import is_prepared, prepare
from megatron_octo.data.tokenizer import load_tokenizer
from megatron_octo.errors import BadInput
from megatron_octo.rundir import is_done, sha256
from tests.conftest import snapshot


@pytest.fixture
def config(tmp_path, corpora, tokenizer_folder) -> PrepareConfig:
    """Settings for the first 50 documents of long."""
    lines = (corpora / "long.jsonl").read_text().splitlines(keepends=True)[:50]
    (tmp_path / "long.jsonl").write_text("".join(lines))
    return PrepareConfig(
        name="long",
        input=tmp_path / "long.jsonl",
        template="long_cot",
        tokenizer=tokenizer_folder,
        output=tmp_path / "data" / "long",
    )


def texts(config: PrepareConfig) -> list[str]:
    rows = [json.loads(line) for line in config.input.read_text().splitlines()]
    return [f"{row['question']}\n<think>\n{row['thinking']}\n</think>\n{row['answer']}" for row in rows]


def documents(folder) -> list[list[int]]:
    return [ids for prefix in read_manifest(folder).prefixes(folder) for ids in read_documents(prefix, 10**6)]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_every_document_is_there_in_order_between_its_control_ids(config, bos, eos):
    config = replace(config, bos=bos, eos=eos)
    prepare(config)
    tokenizer = load_tokenizer(config.tokenizer)
    expected = [[1] * bos + tokenizer.encode(text) + [2] * eos for text in texts(config)]
    assert documents(config.output) == expected
    assert is_done(config.output)


def test_the_manifest_says_what_is_there(config):
    manifest = prepare(config)
    assert manifest == read_manifest(config.output)
    ids = documents(config.output)
    assert (manifest.documents, manifest.tokens, manifest.rejected) == (50, sum(map(len, ids)), 0)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts(config))
    assert manifest.sources[0].sha256 == sha256(config.input)
    assert manifest.tokenizer.sha256 == load_tokenizer(config.tokenizer).sha256
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.bos_id, manifest.tokenizer.eos_id) == (384, 1, 2)
    (shard,) = manifest.shards
    assert shard.bin_sha256 == sha256(config.output / "00000.bin")
    assert shard.idx_sha256 == sha256(config.output / "00000.idx")


def test_the_manifest_holds_the_settings_and_the_packages_that_made_it(config):
    manifest = prepare(config)
    assert manifest.config == replace(config, output=Path())
    assert manifest.packages == tuple(f"{each} {metadata.version(each)}" for each in ("gigatoken", "megatron_octo"))


def test_more_shards_hold_the_same_documents(config):
    prepare(config)
    whole = documents(config.output)
    parts = replace(config, output=config.output.with_name("parts"), shard_tokens=500, piece_bytes=500)
    manifest = prepare(parts)
    assert len(manifest.shards) > 3
    assert all(shard.tokens >= 500 for shard in manifest.shards[:-1])
    assert [shard.prefix for shard in manifest.shards] == [f"{i:05d}" for i in range(len(manifest.shards))]
    assert documents(parts.output) == whole


BROKEN = ['{"question": "alone"}', '{"question": "torn', '{"question": "\\ud800", "thinking": "a", "answer": "b"}']


def with_broken_records(config: PrepareConfig) -> PrepareConfig:
    """The same with three bad records, which may be skipped."""
    lines = config.input.read_text().splitlines()
    lines[3], lines[7], lines[9] = BROKEN
    config.input.write_text("\n".join(lines))
    return replace(config, on_bad_record="skip", most_bad_share=0.1)


def test_bad_records_are_left_out_and_written_with_their_reasons(config):
    config = with_broken_records(config)
    manifest = prepare(config)
    assert (manifest.documents, manifest.rejected) == (47, 3)
    rows = [json.loads(line) for line in (config.output / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["record"]) for row in rows] == list(zip((4, 8, 10), BROKEN, strict=True))
    assert {row["path"] for row in rows} == {str(config.input)}
    reasons = [row["reason"] for row in rows]
    assert reasons[0] == "no column 'thinking'"
    assert reasons[1].startswith("malformed JSON")
    assert "surrogate" in reasons[2]


def test_a_piece_of_bad_records_costs_little_more_than_one_of_good_ones(config):
    config.input.write_text(config.input.read_text() + '{"text": ""}\n' * 50_000)
    manifest = prepare(replace(config, on_bad_record="skip", most_bad_share=0.9999))
    assert manifest.rejected == 50_000  # within the test's time limit only if each is cut out once


def test_what_a_kill_left_before_the_settings_were_written_is_no_obstacle(config):
    config.output.mkdir(parents=True)
    (config.output / ".config.json.123.tmp").write_text("{")
    assert prepare(config).documents == 50


def test_a_bad_record_stops_by_default_and_is_named(config, tmp_path):
    config = replace(with_broken_records(config), on_bad_record="stop")
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match=r"long\.jsonl, line 4: no column 'thinking'"):
        prepare(config)
    (tmp_path / "data").rmdir()  # the empty parent folder
    assert snapshot(tmp_path) == before


def test_more_bad_records_than_allowed_stop_it_with_the_arithmetic(config):
    config = with_broken_records(config)
    with pytest.raises(BadInput, match=r"3 of 50 records[\s\S]*no column 'thinking' \(1, the first at"):
        prepare(replace(config, most_bad_share=0.05))
    assert prepare(replace(config, most_bad_share=0.06)).rejected == 3


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_documents_is_refused_and_nothing_is_left(config, content, tmp_path):
    config.input.write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match="no documents among 0 records"):
        prepare(config)
    (tmp_path / "data").rmdir()
    assert snapshot(tmp_path) == before


def test_a_compressed_file_gives_the_same_tokens(config):
    prepare(config)
    packed = config.input.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(config.input.read_bytes()))
    again = replace(config, input=packed, output=config.output.with_name("again"))
    prepare(again)
    assert (again.output / "00000.bin").read_bytes() == (config.output / "00000.bin").read_bytes()


def test_a_json_array_gives_the_same_tokens(config):
    prepare(config)
    rows = [json.loads(line) for line in config.input.read_text().splitlines()]
    array = config.input.with_suffix(".json")
    array.write_text(json.dumps(rows, indent=2))
    again = replace(config, input=array, output=config.output.with_name("again"), piece_bytes=500)
    prepare(again)
    assert (again.output / "00000.bin").read_bytes() == (config.output / "00000.bin").read_bytes()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_record_that_is_too_long_is_left_out_with_its_beginning(config, num_workers):
    lines = config.input.read_text().splitlines()
    longest = max(map(len, lines))
    lines[7] = json.dumps({"question": "q", "thinking": "long" * longest, "answer": "a"})
    config.input.write_text("\n".join(lines))
    config = replace(config, longest_record_bytes=longest, on_bad_record="skip", most_bad_share=0.1)
    manifest = prepare(config, num_workers=num_workers)
    assert (manifest.documents, manifest.rejected) == (49, 1)
    row = json.loads((config.output / "rejected.jsonl").read_text())
    assert (row["line"], row["record"]) == (8, lines[7][:longest])
    assert row["reason"] == f"{len(lines[7]) + 1:,} bytes are more than longest_record_bytes"


def test_a_record_of_which_nothing_is_chosen_is_counted_as_filtered(config, tmp_path):
    rows = [{"q": "Q?", "found": ["a", "b"], "right": [False, number > 0]} for number in range(3)]
    (tmp_path / "chosen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = (("question", "q"), ("answer", "found[right]"))
    manifest = prepare(replace(config, input=tmp_path / "chosen.jsonl", template="question_answer", columns=columns))
    assert (manifest.documents, manifest.filtered, manifest.rejected) == (2, 1, 0)


def test_a_finished_data_set_is_kept_even_when_its_input_is_gone(config):
    first = prepare(config)
    times = [path.stat().st_mtime_ns for path in sorted(config.output.iterdir())]
    config.input.unlink()
    assert prepare(config) == first
    assert times == [path.stat().st_mtime_ns for path in sorted(config.output.iterdir())]


def test_a_data_set_of_other_settings_is_refused(config):
    prepare(config)
    with pytest.raises(BadInput, match="bos: True in the folder, False asked for"):
        prepare(replace(config, bos=False))


@pytest.mark.parametrize("change", [lambda text: text * 2, lambda text: text.replace("a", "b")])
def test_a_data_set_of_an_input_that_changed_since_is_refused(config, change):
    prepare(config)
    config.input.write_text(change(config.input.read_text()))
    with pytest.raises(BadInput, match=r"long\.jsonl holds something else since .*long was prepared[\s\S]*delete "):
        is_prepared(config)


def test_an_input_that_was_only_touched_is_hashed_and_kept(config, monkeypatch):
    prepare(config)
    monkeypatch.setattr("megatron_octo.data.prepare.sha256", None)  # not called while the time is the same
    assert is_prepared(config)
    monkeypatch.undo()
    config.input.touch()
    assert is_prepared(config)


def test_a_file_that_fits_the_pattern_only_now_is_refused(config):
    config = replace(config, input=config.input.parent / "*.jsonl")
    prepare(config)
    config.input.with_name("more.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match=r"more\.jsonl is new since"):
        is_prepared(config)


def test_a_data_set_of_another_tokenizer_is_refused(config, tmp_path):
    own = tmp_path / "tokenizer"
    shutil.copytree(config.tokenizer, own)
    prepare(replace(config, tokenizer=own))
    (own / "tokenizer.json").write_text((own / "tokenizer.json").read_text() + "\n")
    with pytest.raises(BadInput, match="another tokenizer"):
        is_prepared(replace(config, tokenizer=own))


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_control_id_that_the_tokenizer_lacks_is_refused(config, tmp_path, name):
    own = tmp_path / "tokenizer"
    shutil.copytree(config.tokenizer, own)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    del settings[f"{name}_token"]
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=f"has no {name}_token"):
        prepare(replace(config, tokenizer=own))
    assert not config.output.exists()
    prepare(replace(config, tokenizer=own, **{name: False}))


def test_a_source_may_name_the_tokens_around_its_documents(config, caplog):
    caplog.set_level("INFO", logger="megatron_octo")
    manifest = prepare(replace(config, bos=False, eos_token="<pad>"))
    assert [ids[-1] for ids in documents(config.output)] == [3] * 50
    assert (manifest.tokenizer.eos_token, manifest.tokenizer.eos_id) == ("<pad>", 3)
    assert "prepare long: documents begin with no id of their own and end with <pad> (3)" in caplog.text
    with pytest.raises(BadInput, match=r"asks for eos, and the tokenizer .* has no </doc>"):
        prepare(replace(config, output=config.output.with_name("other"), eos_token="</doc>"))


def test_llama_3s_chat_models_end_documents_with_the_end_of_text_and_a_line_says_so(config, tmp_path, caplog):
    import tokenizers

    caplog.set_level("INFO", logger="megatron_octo")
    own = shutil.copytree(config.tokenizer, tmp_path / "tokenizer")
    tokenizer = tokenizers.Tokenizer.from_file(str(own / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|end_of_text|>", "<|eot_id|>"])
    tokenizer.save(str(own / "tokenizer.json"))
    (own / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<|eot_id|>"}')
    prepare(replace(config, tokenizer=own))
    assert "documents begin with <s> (1) and end with <|end_of_text|> (384)" in caplog.text
    assert "tokenizer_config.json states <|eot_id|>" in caplog.text
    assert {ids[-1] for ids in documents(config.output)} == {384}
    caplog.clear()
    chosen = replace(config, tokenizer=own, eos_token="<|eot_id|>", output=config.output.with_name("chosen"))
    assert prepare(chosen).tokenizer.eos_id == 385
    assert "end with <|eot_id|> (385)" in caplog.text
    assert "tokenizer_config.json states" not in caplog.text


@pytest.mark.parametrize("missing", ["input", "tokenizer"])
def test_a_missing_input_or_tokenizer_is_named(config, tmp_path, missing):
    with pytest.raises(BadInput, match=str(tmp_path / "none")):
        prepare(replace(config, **{missing: tmp_path / "none"}))
    assert not config.output.exists()


def test_the_index_has_megatrons_layout(tmp_path):
    with IndexedWriter(tmp_path / "a", "uint16") as writer:
        for ids in ([5, 6, 7], [], [65499]):
            writer.add(ids)
    assert (writer.documents, writer.tokens) == (3, 4)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<4H", 5, 6, 7, 65499)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 4)  # a document without ids is no sequence
    index += struct.pack("<2i", 3, 1) + struct.pack("<2q", 0, 6) + struct.pack("<4q", 0, 1, 1, 2)
    assert (tmp_path / "a.idx").read_bytes() == index
    assert read_documents(tmp_path / "a", 9) == [[5, 6, 7], [65499]]


def test_ids_take_two_bytes_up_to_megatrons_border(tmp_path):
    assert [token_type(size) for size in (384, 65_499, 65_500, 128_256)] == ["uint16", "uint16", "int32", "int32"]
    with IndexedWriter(tmp_path / "a", "int32") as writer:
        writer.add([128_255, 0])
    assert np.fromfile(tmp_path / "a.bin", dtype=np.int32).tolist() == [128_255, 0]
    assert read_documents(tmp_path / "a", 5) == [[128_255, 0]]


def test_an_index_of_another_make_is_refused(tmp_path):
    (tmp_path / "a.idx").write_bytes(b"TNTIDX\0\0" + bytes(40))
    with pytest.raises(BadInput, match=r"a\.idx is no index"):
        read_documents(tmp_path / "a", 1)
