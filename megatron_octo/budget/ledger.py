"""How many tokens of each source a stage plans to read and has read. Exact: counted from the blend's own order.

A stage whose sources or weights were changed on the way reads in phases, one blend each. What a phase, or a branch,
needs of those before it to go on with unread sequences is how far each shard was read: its stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.config.base import Settings, read_settings
from megatron_octo.config.data import SourceConfig

if TYPE_CHECKING:
    import numpy

FILE = "ledger.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTokens(Settings):
    """One source's line of the ledger."""

    name: str
    available: int
    """Tokens in the prepared data set."""
    planned: int
    """Tokens that the whole stage reads, repeats included."""
    consumed: int
    """Tokens read so far."""
    planned_epochs: float
    """How often the stage reads the source."""
    epochs: float
    """How often it has so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block(Settings):
    """Whole epochs of a shard in one shuffled order: what megatron makes of these two numbers."""

    num_samples: int
    """At least so many sequences; the epochs that it takes are read whole."""
    seed: int
    """Of the shuffles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream(Settings):
    """All that is read of a shard, block after block, and how far."""

    prefix: Path
    """The shard, resolved, without .bin and .idx."""
    blocks: tuple[Block, ...]
    """In the order of reading."""
    used: int
    """Sequences read, from the first block's first on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase(Settings):
    """A stretch of a stage with one mixture."""

    sources: tuple[SourceConfig, ...]
    """What it reads, with weights."""
    start_sequences: int = 0
    """Sequences that the stage had read when it began."""
    before: tuple[SourceTokens, ...] = ()
    """The ledger then."""
    streams: tuple[Stream, ...] = ()
    """How far shards had been read then, by this stage or by those that it goes on from."""

    def describe(self) -> str:
        """A line for the log."""
        weights = ", ".join(f"{source.name} {source.weight:.1%}" for source in self.sources)
        return f"reads {weights}" + (f" after {self.start_sequences:,} sequences" if self.start_sequences else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRecord(Settings):
    """What `ledger.json` of a save holds."""

    planned_tokens: int
    """The stage's budget."""
    consumed_tokens: int
    """Tokens read so far."""
    sources: tuple[SourceTokens, ...]
    """A line for each source, of earlier phases too."""
    phases: tuple[Phase, ...]
    """The last is the one under way."""
    streams: tuple[Stream, ...]
    """How far each shard was read."""


def read_ledger(save: Path) -> LedgerRecord:
    """The ledger of a save."""
    return read_settings(LedgerRecord, save / FILE)


def next_phases(sources: tuple[SourceConfig, ...], record: LedgerRecord, *, seq_length: int) -> tuple[Phase, ...]:
    """The phases of a stage that goes on after a save with `sources`: those so far, and a new one if they differ."""
    if record.phases[-1].sources == sources:
        return record.phases
    position = record.consumed_tokens // seq_length
    return (
        *record.phases,
        Phase(sources=sources, start_sequences=position, before=record.sources, streams=record.streams),
    )


class Ledger:
    """The ledger of a stage, at any of its steps. Rank 0 alone has one."""

    def __init__(
        self,
        *,
        phases: tuple[Phase, ...],
        available: Sequence[int],
        streams: Sequence[Stream],
        source_of: Sequence[int],
        order: numpy.ndarray,
        num_sequences: int,
        seq_length: int,
    ) -> None:
        """Take the arrays.

        Args:
            phases: of the stage; the rest describes the last.
            available: tokens of each source's data set.
            streams: the shards that it reads, as they were when it began, with the blocks that it reads.
            source_of: the index of each shard's source.
            order: for each sequence of the phase, in the order of reading, the index of its shard.
            num_sequences: sequences of the phase; `order` may have more.
            seq_length: tokens of a sequence.
        """
        import numpy

        self._phases, self._phase, self._available = phases, phases[-1], available
        self._streams, self._source_of = streams, numpy.asarray(source_of)
        self._order, self._seq_length = order[:num_sequences], seq_length
        self._read, self._position = self._count(0, 0), 0
        self._planned = self._tokens(self._count(0, num_sequences))

    def sources(self, consumed_sequences: int) -> tuple[SourceTokens, ...]:
        """The lines when the stage has read so many sequences."""
        self._move_to(consumed_sequences - self._phase.start_sequences)
        before = {line.name: (line.available, line.consumed) for line in self._phase.before}
        lines = []
        for source, available, planned, read in zip(
            self._phase.sources, self._available, self._planned, self._tokens(self._read), strict=True
        ):
            _, earlier = before.pop(source.name, (0, 0))
            lines.append(_line(source.name, available, planned=earlier + planned, consumed=earlier + read))
        gone = [_line(name, available, planned=read, consumed=read) for name, (available, read) in before.items()]
        return (*lines, *gone)

    def record(self, consumed_sequences: int) -> LedgerRecord:
        """The content of `ledger.json` when the stage has read so many sequences."""
        sources = self.sources(consumed_sequences)
        now = {stream.prefix: stream for stream in self._phase.streams}
        for stream, read in zip(self._streams, self._read.tolist(), strict=True):
            new = replace(stream, used=stream.used + read)
            now[new.prefix] = max(now.get(new.prefix, new), new, key=lambda each: each.used)
        return LedgerRecord(
            planned_tokens=sum(line.planned for line in sources),
            consumed_tokens=sum(line.consumed for line in sources),
            sources=sources,
            phases=self._phases,
            streams=tuple(now.values()),
        )

    def numbers(self, consumed_sequences: int) -> dict[str, float]:
        """The lines as metrics."""
        return {
            f"data/{line.name}/{name}": value
            for line in self.sources(consumed_sequences)
            for name, value in (
                ("planned_tokens", line.planned),
                ("consumed_tokens", line.consumed),
                ("epochs", line.epochs),
            )
        }

    def _tokens(self, counts: numpy.ndarray) -> list[int]:
        """Tokens of each source in so many sequences of each shard."""
        import numpy

        sequences = numpy.zeros(len(self._available), dtype=numpy.int64)
        numpy.add.at(sequences, self._source_of, counts)
        tokens: list[int] = (sequences * self._seq_length).tolist()
        return tokens

    def _count(self, start: int, stop: int) -> numpy.ndarray:
        """Sequences of each shard among those from `start` to `stop`."""
        import numpy

        return numpy.bincount(self._order[start:stop], minlength=len(self._source_of))

    def _move_to(self, position: int) -> None:
        if position < self._position:  # a run may go back to a save
            self._read, self._position = self._count(0, 0), 0
        self._read = self._read + self._count(self._position, position)
        self._position = position


def _line(name: str, available: int, *, planned: int, consumed: int) -> SourceTokens:
    return SourceTokens(
        name=name,
        available=available,
        planned=planned,
        consumed=consumed,
        planned_epochs=planned / available,
        epochs=consumed / available,
    )
