"""JSON lines, plain and compressed."""

from __future__ import annotations

import gzip

import pytest
import zstandard

from megatron_octo.data.read import read_records
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
