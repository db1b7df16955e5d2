"""What to ask models and how to count their answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_octo.config.base import Settings, require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredModel(Settings):
    """One Hugging Face folder and where its scores go."""

    model: Path
    """The folder."""
    output: Path
    """The folder to write: samples.jsonl, scores.json, DONE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(Settings):
    """Sample answers to problems and grade them."""

    task: str
    """Name of the problem set."""
    problems: Path
    """JSON lines with `input` (the prompt) and `label` (the answer)."""
    models: tuple[ScoredModel, ...]
    """Scored one after the other in one process."""
    samples_per_problem: int = 1
    """Answers to each problem; the score is their mean."""
    temperature: float = 0.0
    """0 is greedy, with one sample."""
    max_new_tokens: int = 1024
    """Longest answer, tokens."""
    seed: int = 0
    """Draws the samples."""

    def __post_init__(self) -> None:
        require_positive(self, "", "samples_per_problem", "max_new_tokens")
        require(
            self.temperature > 0 or self.samples_per_problem == 1,
            f"samples_per_problem {self.samples_per_problem} at temperature 0 would be the same answer again and again",
            fix="raise the temperature or ask for one sample",
        )
