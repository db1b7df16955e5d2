"""JSON lines, plain and compressed."""

from __future__ import annotations

import gzip
import json

import pytest
import zstandard

from megatron_octo.data.read import input_files, pieces, read_records, records
from megatron_octo.errors import BadInput

LINES = b'{"text": "a\\nb"}\n\n{"text": "\xc3\xa9"}\n{"text": \n[1]\n"last, no line end"'
VALUES = [{"text": "a\nb"}, {"text": "\u00e9"}, None, [1], "last, no line end"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
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
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(data))


KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "stream.arrow", "file.arrow"]


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
