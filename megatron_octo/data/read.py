"""Records out of files: JSON lines (plain, .gz, .zst), Parquet, Arrow, told apart by the name.

A file is read in pieces of about 1 MB, cut where the file alone decides: the same piece is the same records, whoever
reads it and wherever reading began. A piece travels to a worker as bytes; `records` takes it apart there.
"""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_octo.data.templates import BadRecord
from megatron_octo.errors import BadInput
from megatron_octo.rundir import read_json

PIECE_BYTES = 1 << 20
MOST_ROWS = 4096  # in a piece of Parquet or Arrow
LINES = (".jsonl", ".json", ".ndjson", ".txt")
COMPRESSED = (".gz", ".zst", ".zstd")
TABLES = (".parquet", ".arrow")
DATASET, DATASETS = "state.json", "dataset_dict.json"  # what datasets' save_to_disk leaves


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some consecutive records of a file."""

    path: Path
    """The file."""
    start: int
    """Where it begins: bytes into the uncompressed lines, or rows into the table."""
    end: int
    """Where the next one begins."""
    first: int
    """Number of its first line or row, from 1."""
    count: int
    """Lines or rows in it."""
    data: bytes
    """The lines, or an Arrow stream."""


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
    path: Path, *, start: int = 0, first: int = 1, columns: Sequence[str] | None = None, piece_bytes: int = PIECE_BYTES
) -> Iterator[Piece]:
    """Yield a file's pieces from `start` on, which must be where a piece begins; `first` numbers its first record.

    `columns` are those to read of a table, None for all.

    Raises:
        BadInput: the file is damaged, or lacks a column.
    """
    import pyarrow

    try:
        if path.suffix in TABLES:
            yield from _table_pieces(path, start, columns, piece_bytes)
        else:
            yield from _line_pieces(path, start, first, piece_bytes)
    except (EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
        raise BadInput(f"{path} cannot be read to its end: {error}", fix="copy or make the file again") from error


def records(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Yield (number, record) of a piece; a BadRecord stands for what is no JSON. Blank lines are left out."""
    if piece.path.suffix in TABLES:
        import pyarrow

        table = pyarrow.ipc.open_stream(piece.data).read_all()
        try:
            yield from enumerate(table.to_pylist(), piece.first)
        except UnicodeDecodeError:  # raised before the first row
            yield from enumerate(map(_row, (table.slice(at, 1) for at in range(len(table)))), piece.first)
        return
    import orjson

    for number, line in enumerate(piece.data.split(b"\n"), piece.first):
        if line and not line.isspace():
            try:
                yield number, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                utf8 = "invalid UTF-8" in str(error) or not _is_utf8(line)
                yield number, BadRecord("invalid UTF-8" if utf8 else f"malformed JSON: {error}")


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
    if piece.path.suffix in TABLES:
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


def _line_pieces(path: Path, start: int, first: int, piece_bytes: int) -> Iterator[Piece]:
    with _open(path) as file:
        _skip(file, start)
        while data := file.read(piece_bytes):
            if not data.endswith(b"\n"):
                data += file.readline()
            count = data.count(b"\n") + (not data.endswith(b"\n"))
            yield Piece(path=path, start=start, end=start + len(data), first=first, count=count, data=data)
            start, first = start + len(data), first + count


def _skip(file: BinaryIO, length: int) -> None:
    """Go `length` bytes on, which a compressed file only does by reading."""
    if file.seekable() and isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(length)
        return
    while length > 0 and (data := file.read(min(length, PIECE_BYTES))):
        length -= len(data)


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))  # a GzipFile reads as one
    if path.suffix in COMPRESSED:
        import pyarrow  # unlike zstandard, it says so when the stream ends too soon

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _table_pieces(path: Path, start: int, columns: Sequence[str] | None, piece_bytes: int) -> Iterator[Piece]:
    """Rows by row group (Parquet) or record batch (Arrow); a piece never reaches across two of these."""
    done = 0
    for rows, width, batches in _parquet(path, columns) if path.suffix == ".parquet" else _arrow(path, columns):
        if done + rows <= start:
            done += rows
            continue
        for batch in batches(max(1, min(MOST_ROWS, piece_bytes // max(width, 1)))):
            if done >= start and batch.num_rows:
                end = done + batch.num_rows
                yield Piece(
                    path=path, start=done, end=end, first=done + 1, count=batch.num_rows, data=_arrow_stream(batch)
                )
            done += batch.num_rows


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, int, Any]]:
    """For each row group: (rows, bytes of a row, a function from rows a batch to its batches)."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=PIECE_BYTES) as file:
        _check_columns(path, file.schema_arrow.names, columns)
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
            _check_columns(path, file.schema.names, columns)
            reader = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            _check_columns(path, reader.schema.names, columns)
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


def _check_columns(path: Path, there: Sequence[str], wanted: Sequence[str] | None) -> None:
    missing = [name for name in wanted or () if name not in there]
    if missing:
        raise BadInput(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(there)}",
            fix="name the right ones in `columns`",
        )


def _check_kind(path: Path) -> None:
    kind = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if not path.is_file() or kind not in (LINES if path.suffix in COMPRESSED else (*LINES, *TABLES)):
        raise BadInput(
            f"input {path} is of no kind that can be read",
            fix=f"give files that end in {', '.join((*LINES, *TABLES))}; lines may be packed: {', '.join(COMPRESSED)}",
        )


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
