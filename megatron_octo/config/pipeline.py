"""The whole road: corpora to report. `octo pipeline` runs these stages in a row and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_octo.config.base import Settings, require, require_name
from megatron_octo.config.data import PrepareConfig, SyntheticConfig, TokenizerConfig
from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.train import MidTrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomBaseConfig(Settings):
    """A base model of random weights in Hugging Face format: the miniature has nothing to download."""

    model: ModelConfig
    """Its shape."""
    tokenizer: Path
    """The tokenizer folder copied into it."""
    output: Path
    """The Hugging Face folder to write."""
    seed: int = 0
    """Draws the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig(Settings):
    """Every stage's settings; a stage left as None, or an empty tuple, is not run."""

    name: str
    """Name of the pipeline and of its folder under OCTO_RUNS (times, report)."""
    corpora: SyntheticConfig | None = None
    """Generated corpora."""
    tokenizer: TokenizerConfig | None = None
    """A tokenizer trained on them."""
    base: RandomBaseConfig | None = None
    """A random base model."""
    base_folder: Path
    """The base model's Hugging Face folder, generated or given."""
    import_folder: Path
    """Where `octo convert from-hf` puts it."""
    prepare: tuple[PrepareConfig, ...] = ()
    """Sources to index."""
    stable: MidTrainConfig
    """The stable stage."""
    branches: tuple[MidTrainConfig, ...]
    """The decay branches."""
    evaluate_before: EvaluateConfig
    """Stable model and branches, before RL."""
    rl: tuple[RLConfig, ...] = ()
    """One a branch."""
    evaluate_after: EvaluateConfig | None = None
    """After RL."""
    train_ranks: int = 1
    """Processes a training stage starts on this machine."""

    def __post_init__(self) -> None:
        require_name(self.name)
        size = self.tokenizer.vocab_size if self.tokenizer else 0
        for stage in (self.stable, *self.branches):
            require(
                size <= stage.model.vocab_size,
                f"tokenizer.vocab_size {size:,} exceeds {stage.name}'s model.vocab_size {stage.model.vocab_size:,}",
                fix="a tokenizer may have fewer ids than the model has rows, never more",
            )
            stage.resolve(self.train_ranks)
        names = [self.stable.name, *(branch.name for branch in self.branches), *(rl.name for rl in self.rl)]
        require(
            len(set(names)) == len(names),
            f"two stages share a name: {', '.join(names)}",
            fix="give each stage a name of its own: it is its folder",
        )
