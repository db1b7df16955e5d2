"""Records of every kind of file: the same ones wherever reading begins, and none of them beyond a length."""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from megatron_octo.data.read import input_files, pieces, raw_records, read_records, records
from megatron_octo.data.templates import BadRecord
from megatron_octo.errors import BadInput

MIB = 1 << 20
LINES = b'{"text": "a\\nb"}\n\n{"text": "\xc3\xa9"}\n{"text": \n[1]\n"last, no line end"'
VALUES = [{"text": "a\nb"}, {"text": "\u00e9"}, None, [1], "last, no line end"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("two_frames.jsonl.zst", zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:])),
    ],
)
def test_each_line_is_a_value_and_a_broken_one_none(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_records(tmp_path / name)) == VALUES


@pytest.mark.parametrize(("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
@pytest.mark.parametrize("damage", ["torn", "not compressed"])
def test_a_damaged_file_is_named(tmp_path, name, compress, damage):
    content = compress(b'{"text": "a"}\n' * 5)
    (tmp_path / name).write_bytes(content[:-9] if damage == "torn" else LINES)
    with pytest.raises(BadInput, match=name):
        list(read_records(tmp_path / name))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"none\.jsonl"):
        list(read_records(tmp_path / "none.jsonl"))


ROWS = [{"text": f"text {number}", "meta": {"id": number}} for number in range(2500)]


def write_rows(path, rows):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=700)
        return
    make = pyarrow.ipc.new_stream if path.stem == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write_lines(path, rows):
    data = b"\n".join(json.dumps(row).encode() for row in rows)
    if path.name.startswith("array"):
        data = json.dumps(rows, indent=1).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(data))


KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines.json", "array.json", "array.json.gz", "a.parquet"]
KINDS += ["stream.arrow", "file.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_records_and_goes_on_where_any_piece_began(tmp_path, name):
    path = tmp_path / name
    (write_rows if path.suffix in (".parquet", ".arrow") else write_lines)(path, ROWS)
    all_pieces = list(pieces(path, piece_bytes=5000))
    assert len(all_pieces) > 5
    found = [numbered for piece in all_pieces for numbered in records(piece)]
    assert [record for _, record in found] == ROWS
    assert [number for number, _ in found] == list(range(1, len(ROWS) + 1))
    for at in (1, 3, len(all_pieces) - 1):
        start = all_pieces[at]
        assert list(pieces(path, start=start.start, first=start.first, piece_bytes=5000)) == all_pieces[at:]
    assert list(pieces(path, start=all_pieces[-1].end, piece_bytes=5000)) == []


def test_only_the_columns_asked_for_are_read(tmp_path):
    write_rows(tmp_path / "a.parquet", ROWS)
    (_, first), *_ = records(next(pieces(tmp_path / "a.parquet", columns=["text"])))
    assert first == {"text": "text 0"}


def test_a_pattern_names_files_in_order_and_a_saved_data_set_its_own(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert input_files(tmp_path / "*.jsonl") == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert len(input_files(tmp_path / "saved")) == 2
    assert list(read_records(tmp_path / "saved")) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("piece_bytes", [1, 50, 1000, 1 << 20])
def test_a_line_beyond_the_longest_is_bad_and_the_others_are_read(tmp_path, name, piece_bytes):
    fits, longer = b'"%s"' % (b"f" * 98), b'"%s"' % (b"l" * 99)
    lines = [b"1", longer, longer, fits, b"2", b'"%s"' % (b"x" * 5000), fits, longer]
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(packed(b"\n".join(lines)))
    found = list(pieces(tmp_path / name, piece_bytes=piece_bytes, longest=100))
    read = dict(numbered for piece in found for numbered in records(piece))
    assert list(read) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [number for number, record in read.items() if isinstance(record, BadRecord)] == [2, 3, 6, 8]
    assert (read[1], read[4], read[5], read[7]) == (1, "f" * 98, 2, "f" * 98)
    assert str(read[6]) == f"{len(lines[5]) + 1:,} bytes are more than longest_record_bytes"
    assert all(len(piece.data) <= 202 for piece in found)
    assert raw_records(found[-1], [8], 10) == ['"lllllllll']
    for at, piece in enumerate(found):
        assert (
            list(pieces(tmp_path / name, start=piece.start, first=piece.first, piece_bytes=piece_bytes, longest=100))
            == found[at:]
        )


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_a_row_beyond_the_longest_is_bad_and_the_others_are_read(tmp_path, name):
    write_rows(tmp_path / name, [{"text": "a"}, {"text": "x" * 5000}, {"text": "c"}])
    found = list(pieces(tmp_path / name, longest=100))
    read = dict(numbered for piece in found for numbered in records(piece))
    assert (read[1], read[3]) == ({"text": "a"}, {"text": "c"})
    assert "more than longest_record_bytes" in str(read[2])
    assert list(pieces(tmp_path / name, start=1, longest=100)) == found[1:]


def test_a_line_far_longer_than_memory_should_be_is_never_held(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
        for _ in range(64):
            file.write(b"x" * MIB)
        file.write(b'\n"next"')
    tracemalloc.start()
    read = [record for piece in pieces(tmp_path / "a.jsonl.gz", longest=2 * MIB) for _, record in records(piece)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read[1] == "next"
    assert peak < 10 * MIB


def test_an_array_larger_than_memory_should_be_is_never_held(tmp_path):
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write("[" + ",".join(json.dumps("x" * MIB) for _ in range(64)) + "]")
    tracemalloc.start()
    count = sum(piece.count for piece in pieces(tmp_path / "a.json.gz", longest=2 * MIB))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 64
    assert peak < 16 * MIB


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[]", []),
        (" [ ] ", []),
        ("\ufeff[1,2]", [1, 2]),
        (
            '[12, -3.5e2, "a, ]\\"[", null, [1, [2]], {"a": "\u00e9"}]',
            [12, -350.0, 'a, ]"[', None, [1, [2]], {"a": "\u00e9"}],
        ),
        ('[\r\n  {"a":\r\n 1}\r\n]\r\n', [{"a": 1}]),
    ],
)
def test_an_array_is_read_item_by_item_however_it_is_written(tmp_path, monkeypatch, text, values):
    (tmp_path / "a.json").write_bytes(text.encode())
    for chunk in (1, 2, 7, 1000):
        monkeypatch.setattr("megatron_octo.data.json_array.CHUNK_BYTES", chunk)
        found = list(read_records(tmp_path / "a.json"))
        assert found == values


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert list(read_records(tmp_path / "a.jsonl")) == [{"text": "a"}, {"text": "b"}]


def test_python_s_nan_is_read_and_its_word_in_broken_json_is_not(tmp_path):
    lines = '{"text": "a", "score": NaN}\n{"text": "b", "score": -Infinity}\n{"text": "NaN"\nnan\n'
    (tmp_path / "a.jsonl").write_text(lines)
    first, second, *broken = read_records(tmp_path / "a.jsonl")
    assert math.isnan(first.pop("score"))
    assert (first, second) == ({"text": "a"}, {"text": "b", "score": -math.inf})
    assert broken == [None, None]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_column_may_have_a_dot_in_its_name_or_lie_inside_of_another(tmp_path, name):
    write_rows(tmp_path / name, [{"meta.question": "Q?", "meta": {"answer": "A."}, "rest": "x"}])
    (found,) = pieces(tmp_path / name, columns=["meta.question", "meta.answer"])
    assert list(records(found)) == [(1, {"meta.question": "Q?", "meta": {"answer": "A."}})]
    with pytest.raises(BadInput, match=r"no column 'none'; it has meta\.question, meta, rest"):
        list(pieces(tmp_path / name, columns=["none.question"]))


def test_a_torn_file_gives_its_whole_lines_before_the_error_that_names_the_next(tmp_path):
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows)[:-30])
    reached = 0
    with pytest.raises(BadInput) as error:
        for piece in pieces(tmp_path / "a.jsonl.gz", piece_bytes=1 << 16):
            for reached, record in records(piece):
                assert record == ROWS[reached - 1]
    assert 2400 < reached < 2500
    assert f"a.jsonl.gz cannot be read from line {reached + 1:,} on" in error.value.what
