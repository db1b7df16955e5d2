"""The elements of a JSON array, one after the other: however long the array, one element is held at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

CHUNK_BYTES = 1 << 18
BEHIND = tuple(" \t\n\r,]")  # a value
_SPACE = re.compile(r"[ \t\n\r]*")


def elements(file: BinaryIO, longest: int) -> Iterator[bytes]:
    """Yield each element as it stands in the file, its line breaks as spaces.

    Raises:
        ValueError: the file is no array, or an element has more than about `longest` bytes.
    """
    window = _Window(file, longest)
    if window.take() != "[":
        raise ValueError("no JSON array")
    follows = window.take() if window.peek() == "]" else ","
    while follows == ",":
        yield window.value().replace("\n", " ").replace("\r", " ").encode()
        follows = window.take()
    if follows != "]":
        raise ValueError(f"malformed JSON: {follows or 'the end'} in place of , or ]")
    if window.peek():
        raise ValueError("text behind the array")


class _Window:
    """A part of a text: what is not yet taken of what has been read."""

    def __init__(self, file: BinaryIO, longest: int) -> None:
        self._file, self._longest = file, longest
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._at = "", 0
        self._scan = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]  # it matches anything
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def take(self) -> str:
        """The same, and go on behind it."""
        character = self.peek()
        self._at += 1
        return character

    def value(self) -> str:
        """Take the next value."""
        self.peek()
        while True:
            try:
                _, end = self._scan(self._held, self._at)
                if self._held[end : end + 1] in BEHIND:  # else a number may go on
                    value, self._at = self._held[self._at : end], end
                    return value
                problem = "cut off"
            except RecursionError:
                raise ValueError("malformed JSON: nested too deeply") from None
            except json.JSONDecodeError as error:
                problem = error.msg
            if len(self._held) - self._at > self._longest:
                raise ValueError(f"an item is malformed JSON, or longer than longest_record_bytes ({self._longest:,})")
            if not self._more():
                raise ValueError(f"malformed JSON: {problem}")

    def _more(self) -> bool:
        """Read on, at least as much again as is held: so a long value is scanned a few times only."""
        self._held, self._at = self._held[self._at :], 0
        data = self._file.read(max(CHUNK_BYTES, len(self._held)))
        self._held += self._decoder.decode(data, final=not data)
        return bool(data)
