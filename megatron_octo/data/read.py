"""JSON lines in: plain, .gz or .zst, told apart by the name."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_octo.errors import BadInput


def check_input(path: Path, *, fix: str = "check the path, or run `octo data generate RECIPE`") -> None:
    """Refuse an input that is not a file.

    Raises:
        BadInput: it is not.
    """
    if not path.is_file():
        raise BadInput(f"no input file {path}", fix=fix)


def read_records(path: Path) -> Iterator[Any]:
    """Yield the value of each line that is not blank, None for a line that is not JSON.

    Raises:
        BadInput: `path` is missing, or its compression is damaged.
    """
    import orjson

    check_input(path)
    try:
        with _open(path) as lines:
            for line in lines:
                if not line.isspace():
                    try:
                        yield orjson.loads(line)
                    except orjson.JSONDecodeError:
                        yield None
    except (EOFError, OSError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read to its end: {error}", fix="copy or make the file again") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))  # a GzipFile reads as one
    if path.suffix == ".zst":
        import pyarrow  # unlike zstandard, it says so when the stream ends too soon

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")
