"""Records out of files: JSON lines and arrays (plain, .gz, .zst), Parquet, Arrow, told apart by the name.

A file is read in pieces of about 1 MB, cut where the file alone decides: the same piece is the same records, whoever
reads it and wherever reading began. A piece travels to a worker as bytes; `records` takes it apart there.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, cast

from megatron_octo.config.data import LONGEST_RECORD_BYTES
from megatron_octo.data.json_array import elements
from megatron_octo.data.templates import BadRecord
from megatron_octo.errors import BadInput
from megatron_octo.rundir import read_json

PIECE_BYTES = 1 << 20
READ_BYTES = 1 << 16  # at once: what came before a damaged place is lost where one read reaches over both
MOST_ROWS = 4096  # in a piece of Parquet or Arrow
ARRAY = ".json"  # such a file may hold lines as well
LINES = (".jsonl", ARRAY, ".ndjson", ".txt")
COMPRESSED = (".gz", ".zst", ".zstd")
TABLES = (".parquet", ".arrow")
KINDS = f"{', '.join((*LINES, *TABLES))}; lines may be packed: {', '.join(COMPRESSED)}"
DAMAGE = (EOFError, OSError, ValueError, zlib.error)  # what reading lines raises
DATASET, DATASETS = "state.json", "dataset_dict.json"  # what datasets' save_to_disk leaves


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some consecutive records of a file."""

    path: Path
    """The file."""
    start: int
    """Where it begins: bytes into the uncompressed lines (an array's elements as such), or rows into the table."""
    end: int
    """Where the next one begins."""
    first: int
    """Number of its first line, row or item, from 1."""
    count: int
    """Lines, rows or items in it."""
    data: bytes
    """The lines, or an Arrow stream."""
    too_long: int = 0
    """Length of the one record in it, if that is longer than allowed: `data` is then its beginning, or nothing."""


def can_read(path: PurePath) -> bool:
    """Whether a file of this name is of a kind that can be read: KINDS."""
    return _kind(path) in (LINES if path.suffix in COMPRESSED else (*LINES, *TABLES))


def record_name(path: PurePath) -> str:
    """What a record of this file is called, before its number."""
    return "row" if path.suffix in TABLES else "item" if _kind(path) == ARRAY else "line"


def input_files(path: Path) -> list[Path]:
    """The files that an input names: itself, those that fit a pattern, or those of a folder that `datasets` saved.

    Raises:
        BadInput: there are none, or one is of a kind that cannot be read.
    """
    if path.is_dir():
        return _dataset_files(path)
    if path.is_file():
        _check_kind(path)
        return [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 - the pattern may be absolute
    if not found:
        raise BadInput(f"no input file {path}", fix="check the path or the pattern, or run `octo data generate RECIPE`")
    for each in found:
        _check_kind(each)
    return found


def names_files(path: Path) -> bool:
    """Whether an input is there: a file, a folder, or a pattern that something fits."""
    return path.exists() or bool(glob.glob(str(path), recursive=True))  # noqa: PTH207 - the pattern may be absolute


def check_input(path: Path) -> None:
    """Refuse an input that names no file, or one that cannot be read; see `input_files`."""
    input_files(path)


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of an input, None for a line that is not JSON; blank lines are no records.

    Raises:
        BadInput: there is no such file, or it is damaged.
    """
    for file in input_files(path):
        for piece in pieces(file):
            for _, record in records(piece):
                yield None if isinstance(record, BadRecord) else record


def pieces(
    path: Path,
    *,
    start: int = 0,
    first: int = 1,
    columns: Sequence[str] | None = None,
    piece_bytes: int = PIECE_BYTES,
    longest: int = LONGEST_RECORD_BYTES,
) -> Iterator[Piece]:
    """Yield a file's pieces from `start` on, which must be where a piece begins; `first` numbers its first record.

    `columns` are those to read of a table, None for all. Of a record of more than `longest` bytes no more is held.

    Raises:
        BadInput: the file is damaged, or lacks a column; an item of an array is longer than `longest`.
    """
    import pyarrow

    reached = first
    try:
        if path.suffix in TABLES:
            found = _table_pieces(path, start, columns, piece_bytes, longest)
        else:
            found = _line_pieces(path, start, first, min(piece_bytes, longest), longest)
        for piece in found:
            yield piece
            reached = piece.first + piece.count
    except (*DAMAGE, pyarrow.ArrowException) as error:
        raise BadInput(
            f"{path} cannot be read from {record_name(path)} {reached:,} on: {error}",
            fix="copy or make the file again",
        ) from error


def records(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Yield (number, record) of a piece; a BadRecord stands for what is no record. Blank lines are left out."""
    if piece.too_long:
        yield piece.first, BadRecord(f"{piece.too_long:,} bytes are more than longest_record_bytes")
        return
    if piece.path.suffix in TABLES:
        import pyarrow

        table = pyarrow.ipc.open_stream(piece.data).read_all()
        try:
            yield from enumerate(table.to_pylist(), piece.first)
        except UnicodeDecodeError:  # raised before the first row
            yield from enumerate(map(_row, (table.slice(at, 1) for at in range(len(table)))), piece.first)
        return
    data = piece.data.removeprefix(codecs.BOM_UTF8) if piece.start == 0 else piece.data
    for number, line in enumerate(data.split(b"\n"), piece.first):
        if line and not line.isspace():
            yield number, _value(line)


def _value(line: bytes) -> Any:
    """What a line of JSON says. NaN and Infinity, which JSON does not know, are read as Python writes them."""
    import orjson

    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if b"NaN" in line or b"Infinity" in line:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(line)
        if line.strip() in (b"{", b"["):
            return BadRecord("malformed JSON: a value over several lines; give each a line of its own (jq -c .)")
        utf8 = "invalid UTF-8" in str(error) or not _is_utf8(line)
        return BadRecord("invalid UTF-8" if utf8 else f"malformed JSON: {error}")


def _row(table: Any) -> Any:
    """The one row of a table."""
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecord("invalid UTF-8")


def raw_records(piece: Piece, numbers: Sequence[int], longest: int) -> list[str]:
    """Some records as they stand in the file, for people to look at; cut after `longest` characters."""
    if not numbers:
        return []
    if piece.path.suffix in TABLES and not piece.too_long:
        rows = dict(records(piece))
        return [repr(rows[number])[:longest] for number in numbers]
    lines = piece.data.split(b"\n")
    return [lines[number - piece.first][: 4 * longest].decode(errors="replace")[:longest] for number in numbers]


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _line_pieces(path: Path, start: int, first: int, piece_bytes: int, longest: int) -> Iterator[Piece]:
    with _open(path) as file:
        if _kind(path) == ARRAY and _begins_array(file):
            at, first, found = 0, 1, _array_lines(file, piece_bytes, longest)
        else:
            _skip(file, start)
            at, found = start, _lines(file, piece_bytes, longest)
        for data, length in found:
            too_long = length if length > len(data) else 0
            count = 1 if too_long else data.count(b"\n") + (not data.endswith(b"\n"))
            if at >= start:
                yield Piece(
                    path=path, start=at, end=at + length, first=first, count=count, data=data, too_long=too_long
                )
            at, first = at + length, first + count


def _lines(file: io.BufferedReader, size: int, longest: int) -> Iterator[tuple[bytes, int]]:
    """Yield (some whole lines, their length), or (the beginning of a line beyond `longest`, the length of all of it).

    `size` is at most `longest`: so only the line in which a read ends can be too long. Of a damaged file all whole
    lines come before the error.
    """
    while True:
        data, rest, cut = bytearray(), b"", 0
        try:
            while len(data) < size and (more := file.read1(min(size - len(data), READ_BYTES))):
                data += more
            cut = data.rfind(b"\n") + 1
            if cut < len(data):
                rest = file.readline(longest - (len(data) - cut) + 1)
        except DAMAGE:
            if cut := data.rfind(b"\n") + 1:
                yield bytes(data[:cut]), cut
            raise
        if not data:
            return
        last = len(data) - cut + len(rest)
        if last - rest.endswith(b"\n") <= longest:
            yield bytes(data) + rest, len(data) + len(rest)
            continue
        if cut:
            yield bytes(data[:cut]), cut
        yield (bytes(data[cut:]) + rest)[: min(longest, PIECE_BYTES)], last + _skip_line(file)


def _skip_line(file: io.BufferedReader) -> int:
    """Go to the next line; the bytes on the way."""
    length = 0
    while part := file.readline(PIECE_BYTES):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


def _begins_array(file: io.BufferedReader) -> bool:
    return file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _array_lines(file: io.BufferedReader, size: int, longest: int) -> Iterator[tuple[bytes, int]]:
    """Yield the elements of an array as `_lines` yields lines; one that is too long is damage."""
    data = bytearray()
    try:
        for element in elements(file, longest):
            data += element + b"\n"
            if len(data) >= size:
                yield bytes(data), len(data)
                data.clear()
    except DAMAGE:
        if data:
            yield bytes(data), len(data)
        raise
    if data:
        yield bytes(data), len(data)


def _skip(file: io.BufferedReader, length: int) -> None:
    """Go `length` bytes on, which a compressed file only does by reading."""
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(length)
        return
    while length > 0 and (data := file.read(min(length, PIECE_BYTES))):
        length -= len(data)


def _open(path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return cast(io.BufferedReader, gzip.open(path, "rb"))  # a GzipFile reads as one
    if path.suffix in COMPRESSED:
        import pyarrow  # unlike zstandard, it says so when the stream ends too soon

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _table_pieces(
    path: Path, start: int, columns: Sequence[str] | None, piece_bytes: int, longest: int
) -> Iterator[Piece]:
    """Rows by row group (Parquet) or record batch (Arrow); a piece never reaches across two of these."""
    done = 0
    for rows, width, batches in _parquet(path, columns) if path.suffix == ".parquet" else _arrow(path, columns):
        if done + rows <= start:
            done += rows
            continue
        for batch in batches(max(1, min(MOST_ROWS, piece_bytes // max(width, 1)))):
            whole = batch.nbytes <= longest
            for part in [batch] if whole else (batch.slice(at, 1) for at in range(batch.num_rows)):
                if done >= start and part.num_rows:
                    yield _table_piece(path, done, part, longest)
                done += part.num_rows


def _table_piece(path: Path, start: int, batch: Any, longest: int) -> Piece:
    """A batch as a piece; one that is too long has a single row."""
    too_long = batch.nbytes if batch.nbytes > longest else 0
    return Piece(
        path=path,
        start=start,
        end=start + batch.num_rows,
        first=start + 1,
        count=batch.num_rows,
        data=b"" if too_long else _arrow_stream(batch),
        too_long=too_long,
    )


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, int, Any]]:
    """For each row group: (rows, bytes of a row, a function from rows a batch to its batches)."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=PIECE_BYTES) as file:
        columns = _top_columns(path, file.schema_arrow.names, columns)
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)

            def batches(rows: int, group: int = group) -> Iterator[Any]:
                return cast(
                    Iterator[Any],
                    file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False),
                )

            yield about.num_rows, about.total_byte_size // max(about.num_rows, 1), batches


def _arrow(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, int, Any]]:
    """For each record batch of an Arrow stream or file: as `_parquet`."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader: Any = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            columns = _top_columns(path, file.schema.names, columns)
            reader = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            columns = _top_columns(path, reader.schema.names, columns)
        for whole in reader:
            chosen = whole.select(columns) if columns is not None else whole

            def batches(rows: int, batch: Any = chosen) -> Iterator[Any]:
                return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))

            yield chosen.num_rows, chosen.nbytes // max(chosen.num_rows, 1), batches


def _arrow_stream(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _top_columns(path: Path, there: Sequence[str], wanted: Sequence[str] | None) -> list[str] | None:
    """The columns of a table in which those that are wanted lie: `meta` for `meta.question`, unless that is one."""
    if wanted is None:
        return None
    names = list(dict.fromkeys(name if name in there else name.partition(".")[0] for name in wanted))
    if missing := [name for name in names if name not in there]:
        raise BadInput(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(there)}",
            fix="name the right ones in `columns`",
        )
    return names


def _kind(path: PurePath) -> str:
    """The ending that says what a file holds once it is unpacked."""
    return PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _check_kind(path: Path) -> None:
    if not path.is_file() or not can_read(path):
        raise BadInput(f"input {path} is of no kind that can be read", fix=f"give files that end in {KINDS}")


def _dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved, in their order."""
    if (folder / DATASETS).is_file():
        splits = read_json(folder / DATASETS).get("splits", [])
        raise BadInput(
            f"{folder} holds a data set's splits: {', '.join(splits)}",
            fix=f"name the folder of one: {folder / splits[0] if splits else folder}",
        )
    if not (folder / DATASET).is_file():
        raise BadInput(
            f"input {folder} is a folder, and not one that `datasets` saved",
            fix=f"give a pattern: {folder}/*.jsonl",
        )
    state = read_json(folder / DATASET)
    if state.get("_indices_files"):
        raise BadInput(f"{folder} holds a selection of rows", fix="save it again after `.flatten_indices()`")
    return [folder / each["filename"] for each in state["_data_files"]]
