"""Whether a problem shares 13 words in a row with one of an evaluation set: the usual test for training on the test.

A word is letters and digits between others, in lower case, as GPT-3's report has it (arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_octo.data.read import read_records
from megatron_octo.errors import BadInput

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
        """Those of all texts in the records of these files, however deep.

        Raises:
            BadInput: there is no such file, it is damaged, or has no such run.
        """
        owners: dict[str, str] = {}
        for path in paths:
            found = {
                words: str(path) for record in read_records(path) for text in _texts(record) for words in _runs(text)
            }
            if not found:
                raise BadInput(
                    f"{path} has no text of {NUM_WORDS} words: it would leave out nothing",
                    fix="name a file that has the evaluation set's problems, or leave it out of decontaminate_against",
                )
            owners |= found
        return cls(owners)

    def find(self, text: str) -> Overlap | None:
        """The first run of words that the text shares, None for none."""
        return next((Overlap(self.owners[words], words) for words in _runs(text) if words in self.owners), None)


def is_too_short(text: str) -> bool:
    """Whether a text has no run of 13 words, and so shares none."""
    return next(_runs(text), None) is None


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _runs(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    for start in range(len(words) - NUM_WORDS + 1):
        yield " ".join(words[start : start + NUM_WORDS])
