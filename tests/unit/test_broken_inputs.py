"""Every kind of broken input: one message with the file, the record and the reason; nothing half-made is left."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.prepare import prepare
from megatron_octo.errors import BadInput

GOOD = b'{"text": "a"}\n' * 4
LIMIT = 1 << 20


def table(rows: list[dict[str, Any]], path: Path, *, kind: str = "parquet") -> None:
    import pyarrow
    import pyarrow.parquet

    made = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(made, path)
        return
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made)


def invalid_text(path: Path) -> None:
    import pyarrow

    text = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    with pyarrow.OSFile(str(path), "wb") as file:
        made = pyarrow.table({"text": text})
        with pyarrow.ipc.new_stream(file, made.schema) as writer:
            writer.write_table(made)


def torn_table(path: Path) -> None:
    table([{"text": "a" * 100}] * 100, path)
    path.write_bytes(path.read_bytes()[:-40])


def saved_folder(path: Path, state: str = "state.json", **content: Any) -> None:
    path.mkdir()
    (path / state).write_text(json.dumps(content))


BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "malformed JSON": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": \n'), r"line 5: malformed JSON"),
    "a line cut off": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": "b'), r"line 5: malformed JSON"),
    "two values in a line": ("a.jsonl", lambda p: p.write_bytes(GOOD + b"{} {}\n"), r"line 5: malformed JSON"),
    "no object": ("a.jsonl", lambda p: p.write_bytes(GOOD + b"[1]\n"), r"line 5: no column 'text'"),
    "a missing column": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"body": "a"}\n'), r"line 5: no column 'text'"),
    "null": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": null}\n'), r"line 5: text is missing"),
    "a number": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": 5}\n'), r"line 5: text is no text but int"),
    "a list": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": ["a"]}\n'), r"line 5: text is no text but list"),
    "invalid UTF-8": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": "\xff"}\n'), r"line 5: invalid UTF-8"),
    "half a pair": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": "\\ud800"}\n'), r"line 5: .*"),
    "an empty document": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": ""}\n'), r"line 5: empty document"),
    "only white space": ("a.jsonl", lambda p: p.write_bytes(GOOD + b'{"text": " \\n"}\n'), r"line 5: empty document"),
    "a zero byte": ("a.jsonl", lambda p: p.write_bytes(GOOD + b"\x00\n"), r"line 5: malformed JSON"),
    "an empty file": ("a.jsonl", lambda p: p.write_bytes(b""), r"no documents among 0 records"),
    "UTF-16": ("a.jsonl", lambda p: p.write_bytes('{"text": "a"}'.encode("utf-16")), r"line 1: invalid UTF-8"),
    "a value over several lines": (
        "a.jsonl",
        lambda p: p.write_text(json.dumps({"text": "a"}, indent=1)),
        r"line 1: malformed JSON: a value over several lines",
    ),
    "a line too long": (
        "a.jsonl",
        lambda p: p.write_bytes(GOOD + b'"%s"\n' % bytes(LIMIT)),
        r"line 5: .* are more than",
    ),
    "an array cut off": ("a.json", lambda p: p.write_text('[{"text": "a"}, {"te'), r"from item 2 on: malformed JSON"),
    "an array without commas": (
        "a.json",
        lambda p: p.write_text('[{"text": "a"} {}]'),
        r"from item 2 on: .*in place of",
    ),
    "an array and more": ("a.json", lambda p: p.write_text('[{"text": "a"}] []'), r"from item 2 on: text behind"),
    "an item too long": (
        "a.json",
        lambda p: p.write_text('["%s"]' % (" " * 2 * LIMIT)),
        r"from item 1 on: .*longer than",
    ),
    "an array deep in arrays": ("a.json", lambda p: p.write_text("[" * 100_000), r"from item 1 on: .*too deeply"),
    "a truncated gz": (
        "a.jsonl.gz",
        lambda p: p.write_bytes(gzip.compress(GOOD + b'{"te')[:-9]),
        r"a\.jsonl\.gz cannot be read from line 5 on",
    ),
    "a damaged gz": ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(GOOD)[:12] + b"xxxx"), r"cannot be read"),
    "no gz": ("a.jsonl.gz", lambda p: p.write_bytes(GOOD), r"cannot be read"),
    "a truncated zst": ("a.jsonl.zst", lambda p: p.write_bytes(zstandard.compress(GOOD)[:-5]), r"cannot be read"),
    "a truncated Parquet file": ("a.parquet", torn_table, r"a\.parquet cannot be read"),
    "no Parquet file": ("a.parquet", lambda p: p.write_bytes(GOOD), r"a\.parquet cannot be read"),
    "Parquet without the column": (
        "a.parquet",
        lambda p: table([{"body": "a"}], p),
        r"has no column 'text'; it has body",
    ),
    "Parquet with nulls": ("a.parquet", lambda p: table([{"text": "a"}, {"text": None}], p), r"row 2: text is missing"),
    "Arrow without the column": ("a.arrow", lambda p: table([{"b": "a"}], p, kind="arrow"), r"has no column 'text'"),
    "no Arrow file": ("a.arrow", lambda p: p.write_bytes(GOOD), r"a\.arrow cannot be read"),
    "Arrow with invalid UTF-8": ("a.arrow", invalid_text, r"row 2: invalid UTF-8"),
    "an unknown kind": ("a.docx", lambda p: p.write_bytes(GOOD), r"a\.docx is of no kind that can be read"),
    "a folder of something": ("a", lambda p: p.mkdir(), r"not one that `datasets` saved"),
    "a folder of splits": ("a", lambda p: saved_folder(p, "dataset_dict.json", splits=["x"]), r"splits: x"),
    "a selection of rows": ("a", lambda p: saved_folder(p, _indices_files=[1], _data_files=[]), r"a selection of rows"),
    "a pattern without a file": ("*.json", lambda p: None, r"no input file"),
}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_named_and_nothing_is_left(name, num_workers, tmp_path, tokenizer_folder):
    file, write, message = BROKEN[name]
    write(tmp_path / file)
    output = tmp_path / "out"
    config = PrepareConfig(
        name="broken",
        input=tmp_path / file,
        template="text",
        tokenizer=tokenizer_folder,
        output=output,
        longest_record_bytes=LIMIT,
    )
    with pytest.raises(BadInput, match=message) as error:
        prepare(config, num_workers=num_workers)
    assert error.value.fix
    assert not output.exists()
