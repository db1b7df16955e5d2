"""Weights and a budget -> tokens, sequences and epochs of each source, and whether one would repeat too often."""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def epochs(self) -> float:
        """How often the stage reads the source."""
        return self.tokens / self.available


def plan(config: MixtureConfig, *, available: Sequence[int], train_tokens: int) -> tuple[SourcePlan, ...]:
    """The plan, sources in the recipe's order; `available` are the tokens of their data sets."""
    return tuple(
        SourcePlan(
            name=source.name,
            weight=source.weight,
            available=tokens,
            tokens=round(source.weight * train_tokens),
            sequences=round(source.weight * train_tokens / config.seq_length),
            max_epochs=source.max_epochs,
        )
        for source, tokens in zip(config.sources, available, strict=True)
    )


def check_repeats(plans: Sequence[SourcePlan]) -> None:
    """Refuse a plan that reads a source more often than its cap.

    Raises:
        BadInput: so it is; the message has the arithmetic.
    """
    for each in plans:
        if each.epochs > each.max_epochs:
            total = round(each.tokens / each.weight)
            raise BadInput(
                f"source {each.name} would repeat too often: weight {each.weight:g} x {total:,} tokens = "
                f"{each.tokens:,} of {each.available:,} available = {each.epochs:.2f} epochs, more than max_epochs "
                f"{each.max_epochs:g}",
                fix=f"lower its weight to {each.max_epochs * each.available / total:.4g} or less, prepare more of it, "
                "or raise its max_epochs",
            )
