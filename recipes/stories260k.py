"""Your own data, the whole road: the texts of own_data.py, and the smallest of Llamas as their base.

stories260K (karpathy/tinyllamas, MIT) tells children's stories with 260,000 parameters and a vocabulary of 512; as a
Hugging Face folder with its SentencePiece tokenizer it lies in $OCTO_RUNS/hf/stories260K. docs/training.md walks the
road and shows what it prints: minutes on two cores. What there is to change for a larger model is the base, MODEL,
the layout and the budgets.
"""

from dataclasses import replace

import own_data

from megatron_octo.config.data import MixtureConfig, PrepareConfig, SourceConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.schedule import ConstantRate, CosineRate
from megatron_octo.config.train import (
    BudgetConfig,
    FromImport,
    FromRun,
    MidTrainConfig,
    PrecisionConfig,
    SaveConfig,
    ValidateConfig,
)
from megatron_octo.rundir import run_folder

BASE = run_folder("hf") / "stories260K"
DATA = run_folder("data-stories260k")
MODEL = ModelConfig(
    hidden_size=64,
    num_layers=5,
    num_heads=8,
    num_kv_heads=4,
    ffn_size=172,
    vocab_size=512,
    tied_embeddings=True,
    rope_theta=10_000.0,
    max_positions=512,
)
SEQ_LENGTH = 256
BATCH_SEQUENCES = 32
STABLE_STEPS = 300  # x 32 x 256 = 2,457,600 tokens
DECAY_STEPS = 200  # x 32 x 256 = 1,638,400 tokens

STABLE_MIX = {"stable-text": 0.8, "gsm8k": 0.1, "openstax-exercises": 0.1}
DECAY_MIX = {"stable-text": 0.5, "long-cot": 0.3, "gsm8k": 0.2}


def stable_text() -> PrepareConfig:
    """Mathematical texts, by the base's own tokenizer."""
    return _by_its_tokenizer(own_data.stable_text())


def gsm8k() -> PrepareConfig:
    """Short chains of thought, by the base's own tokenizer."""
    return _by_its_tokenizer(own_data.gsm8k())


def math_hard() -> PrepareConfig:
    """Short chains of thought, longer ones, by the base's own tokenizer."""
    return _by_its_tokenizer(own_data.math_hard())


def openstax_exercises() -> PrepareConfig:
    """Questions and answers, by the base's own tokenizer."""
    return _by_its_tokenizer(own_data.openstax_exercises())


def long_cot() -> PrepareConfig:
    """Long chains of thought, by the base's own tokenizer; a trial of the format, see own_data.py."""
    return _by_its_tokenizer(own_data.long_cot())


def stable() -> MidTrainConfig:
    """The stable stage: 2.5M tokens at a constant rate, from the base."""
    return MidTrainConfig(
        name="stories260k-stable",
        model=MODEL,
        start=FromImport(path=run_folder("base") / "stories260k"),
        data=_mixture(STABLE_MIX),
        budget=_budget(STABLE_STEPS),
        learning_rate=ConstantRate(peak=1e-3),
        precision=PrecisionConfig(dtype="fp32"),
        save=SaveConfig(every_steps=100),
        validate=ValidateConfig(every_steps=100, sequences=32),
        log_every_steps=50,
    )


def decay_long() -> MidTrainConfig:
    """The branch with long chains of thought: 1.6M tokens, the rate a cosine to a tenth, from the stable run."""
    return replace(
        stable(),
        name="stories260k-decay-long",
        start=FromRun(run="stories260k-stable"),
        data=_mixture(DECAY_MIX),
        budget=_budget(DECAY_STEPS),
        learning_rate=CosineRate(peak=1e-3, floor=1e-4),
    )


def _by_its_tokenizer(source: PrepareConfig) -> PrepareConfig:
    return replace(source, tokenizer=BASE, output=DATA / source.name, validation_share=0.01)


def _budget(steps: int) -> BudgetConfig:
    return BudgetConfig(
        train_tokens=steps * BATCH_SEQUENCES * SEQ_LENGTH, batch_sequences=BATCH_SEQUENCES, micro_batch_sequences=8
    )


def _mixture(weights: dict[str, float]) -> MixtureConfig:
    sources = tuple(SourceConfig(name=name, path=DATA / name, weight=weight) for name, weight in weights.items())
    return MixtureConfig(sources=sources, tokenizer=BASE, seq_length=SEQ_LENGTH)
