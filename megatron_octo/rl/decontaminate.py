"""Whether a problem shares 13 words in a row with one of an evaluation set: the usual test for training on the test.

A word is letters and digits between others, in lower case, as GPT-3's report has it (arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.data.read import read_records

NUM_WORDS = 13
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a problem shares."""

    evaluation_set: str
    words: str


@dataclass(frozen=True, slots=True)
class Overlaps:
    """All runs of 13 words in the texts of evaluation sets."""

    owners: dict[str, str]
    """The set of each."""

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Overlaps:
        """Those of all texts in the records of these files.

        Raises:
            BadInput: there is no such file, or it is damaged.
        """
        return cls({words: str(path) for path in paths for text in _texts(path) for words in _runs(text)})

    def find(self, text: str) -> Overlap | None:
        """The first run of words that the text shares, None for none."""
        return next((Overlap(self.owners[words], words) for words in _runs(text) if words in self.owners), None)


def _texts(path: Path) -> Iterator[str]:
    for record in read_records(path):
        values: list[Any] = list(record.values()) if isinstance(record, dict) else [record]
        yield from (value for value in values if isinstance(value, str))


def _runs(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    for start in range(len(words) - NUM_WORDS + 1):
        yield " ".join(words[start : start + NUM_WORDS])
