"""Weights and a budget -> tokens, sequences and epochs of each source, and whether one would repeat too often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_octo.config.data import MixtureConfig
from megatron_octo.errors import BadInput


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePlan:
    """What a stage reads of one source. The blend itself rounds to whole sequences; the ledger counts those."""

    name: str
    weight: float
    available: int
    """Tokens in the prepared data set."""
    tokens: int
    """Tokens that the stage reads, repeats included."""
    sequences: int
    max_epochs: float
    read_before: int = 0
    """Tokens of it that were read before: by the stage in earlier phases, and by a parent that it reads on after."""

    @property
    def epochs(self) -> float:
        """How often the source has been read at the stage's end."""
        return (self.read_before + self.tokens) / self.available


def plan(
    config: MixtureConfig, *, available: Sequence[int], train_tokens: int, read_before: Mapping[str, int] | None = None
) -> tuple[SourcePlan, ...]:
    """The plan, sources in the recipe's order.

    Args:
        config: the mixture.
        available: tokens of the sources' data sets.
        train_tokens: to read by this mixture.
        read_before: tokens of sources, by name, that were read before.
    """
    return tuple(
        SourcePlan(
            name=source.name,
            weight=source.weight,
            available=tokens,
            tokens=round(source.weight * train_tokens),
            sequences=round(source.weight * train_tokens / config.seq_length),
            max_epochs=source.max_epochs,
            read_before=(read_before or {}).get(source.name, 0),
        )
        for source, tokens in zip(config.sources, available, strict=True)
    )


def check_repeats(plans: Sequence[SourcePlan], *, reader: str = "before") -> None:
    """Refuse a plan that reads a source more often than its cap; `reader` ends "what was read ...".

    Raises:
        BadInput: so it is; the message has the arithmetic.
    """
    for each in plans:
        if each.epochs > each.max_epochs:
            total = round(each.tokens / each.weight)
            earlier = f" + {each.read_before:,} read {reader}" if each.read_before else ""
            most = max(0.0, each.max_epochs * each.available - each.read_before) / total
            raise BadInput(
                f"source {each.name} would repeat too often: weight {each.weight:g} x {total:,} tokens = "
                f"{each.tokens:,}{earlier} of {each.available:,} available = {each.epochs:.2f} epochs, more than "
                f"max_epochs {each.max_epochs:g}",
                fix=f"lower its weight to {most:.4g} or less, prepare more of it, or raise its max_epochs",
            )
