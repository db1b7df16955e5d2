"""How many tokens of each source a stage plans to read and has read. Exact: counted from the blend's own order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTokens:
    """One source's line of the ledger."""

    name: str
    available: int
    """Tokens in the prepared data set."""
    planned: int
    """Tokens that the whole stage reads, repeats included."""
    consumed: int
    """Tokens read so far."""

    @property
    def planned_epochs(self) -> float:
        """How often the stage reads the source."""
        return self.planned / self.available


def count(
    order: numpy.ndarray,
    *,
    names: Sequence[str],
    available: Sequence[int],
    planned_sequences: int,
    consumed_sequences: int,
    seq_length: int,
) -> tuple[SourceTokens, ...]:
    """The ledger, sources in the order of `names`.

    Args:
        order: for each sequence of the stage, in the order of reading, the index of its source.
        names: the sources.
        available: tokens of each source's data set.
        planned_sequences: sequences that the stage reads.
        consumed_sequences: sequences read so far.
        seq_length: tokens of a sequence.
    """
    import numpy

    planned, consumed = (
        numpy.bincount(order[:sequences], minlength=len(names)) * seq_length
        for sequences in (planned_sequences, consumed_sequences)
    )
    return tuple(
        SourceTokens(name=name, available=available[i], planned=int(planned[i]), consumed=int(consumed[i]))
        for i, name in enumerate(names)
    )


def to_json(ledger: Sequence[SourceTokens]) -> dict[str, Any]:
    """The content of `ledger.json`."""
    return {
        "planned_tokens": sum(each.planned for each in ledger),
        "consumed_tokens": sum(each.consumed for each in ledger),
        "sources": [{**asdict(each), "planned_epochs": each.planned_epochs} for each in ledger],
    }
