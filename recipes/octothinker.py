"""Stable-then-decay at full size: the paper's mixtures, budgets and rates, for the model files beside this one.

OctoThinker, arXiv 2506.20512, whose own body was not at hand. Where its numbers come from:

  stated    in the paper's Tables 2 to 5, as several texts that quote them agree: the weights of the mixtures, 50,000
            and 5,000 steps of 512 x 8,192 tokens, AdamW with weight decay 0.1, the rates of the three Llamas, no
            warm-up, constant and then a cosine to a tenth
  inferred  that a branch takes over the optimizer's moments, that attention crosses the borders of documents, that
            Llama-3's tokenizer made the corpora
  ours      the shares within the instruction pool, betas, eps and clipping (config/train.py), FP8, all layouts, when to
            save, everything of Qwen2.5: the paper compares with it, but mid-trains Llamas only

What a recipe reads lies in $OCTO_RUNS (default: runs). `octo data prepare recipes/corpora.py:NAME` writes each source
to runs/data/NAME; the base model, say Llama-3.2-3B, becomes runs/base/llama32-3b by

    hf download meta-llama/Llama-3.2-3B --local-dir runs/hf/llama32-3b
    octo convert from-hf runs/hf/llama32-3b runs/base/llama32-3b

A recipe is laid out for H100, of 80 GB; RECIPE@h200 and RECIPE@b200 take the other `LAYOUTS` of a model's file. The
number of GPUs is the launcher's affair: each layout serves 8, 64 and 256, since 512 sequences divide by all of them and
more ranks only share the optimizer's state further. docs/training.md has the memory of each.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_octo.config.data import MixtureConfig, SourceConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.schedule import ConstantRate, CosineRate
from megatron_octo.config.train import (
    BudgetConfig,
    FromImport,
    FromRun,
    Layout,
    MidTrainConfig,
    PrecisionConfig,
    SaveConfig,
)
from megatron_octo.rundir import run_folder

SEQ_LENGTH = 8192
BATCH_SEQUENCES = 512
STABLE_STEPS = 50_000  # x 512 x 8,192 = 209,715,200,000 tokens
DECAY_STEPS = 5_000  # x 512 x 8,192 = 20,971,520,000 tokens

# FP8 for matrix products, the first and the last layer left in BF16 for caution: a scale a tensor on Hopper, with which
# the fastest published runs were made; blocks of 32 on Blackwell.
TENSORWISE = PrecisionConfig(fp8="tensorwise", bf16_first_layers=1, bf16_last_layers=1)
MXFP8 = PrecisionConfig(fp8="mxfp8", bf16_first_layers=1, bf16_last_layers=1)

QWEN = {"tokenizer": "qwen2.5", "data": "data-qwen2.5"}

# Table 2. MegaMath's code has no text on the Hub (recipes/corpora.py): who does not fetch it can give its share to
# translated code, 0.025 x 209.7B = 5.2B of 7.2B tokens.
STABLE_MIX = {
    "megamath-web-pro-max": 0.7250,
    "dclm-baseline": 0.1000,
    "megamath-text-code-block": 0.1000,
    "megamath-qa": 0.0500,
    "megamath-code": 0.0125,
    "megamath-translated-code": 0.0125,
}

# A tenth of every branch is a pool of about 0.8B tokens (stated). Its parts of 0.01B, 0.29B and 0.51B (recalled) are
# read in proportion, so that each is read equally often: 0.10 x 20.97B / 0.81B = 2.6 times.
INSTRUCTIONS = {"tulu-3-instruction-following": 0.0012, "wildchat": 0.0358, "ultrachat": 0.0630}

# Table 5: what all branches share, and what makes each.
DECAY_SHARED = {
    "megamath-web-pro": 0.55,
    "dclm-baseline": 0.05,
    **INSTRUCTIONS,
}
DECAY_MIX = {
    "short": {
        **DECAY_SHARED,
        "megamath-qa": 0.025,
        "open-math-instruct-2": 0.175,
        "numina-math-1-5": 0.10,
    },
    "long": {
        **DECAY_SHARED,
        "open-r1-math": 0.15,
        "am-deepseek-distilled": 0.15,
    },
    "hybrid": {
        **DECAY_SHARED,
        "open-math-instruct-2": 0.10,
        "numina-math-1-5": 0.10,
        "open-r1-math": 0.10,
    },
}

# The paper repeats these more often than our usual cap of 4 may allow:
MAX_EPOCHS = {
    # 0.15 x 20.97B = 3.15B tokens in decay long, 0.40 x 10.0B = 4.0B in an ablation. Of 1.05B (recalled) that is 3.0
    # and 3.8 epochs. If that counts all 225k problems, the 93.7k of the subset `default` have 0.44B: 7.2 and 9.1.
    "open-r1-math": 10.0,
    # 0.10 x 20.97B = 2.10B tokens. How many it has is not found; 0.53 GB of Parquet at 2 to 4 bytes of text a byte and
    # 3.5 a token are 0.3B to 0.6B: 3.5 to 7 epochs.
    "numina-math-1-5": 8.0,
}


def stable(
    name: str, model: ModelConfig, *, peak: float, layout: Layout, tokenizer: str = "llama-3", data: str = "data"
) -> MidTrainConfig:
    """The stable stage of the base model that lies in $OCTO_RUNS/base/NAME.

    Args:
        name: the model, as names of runs begin.
        model: its shape.
        peak: the rate.
        layout: how it lies on the GPUs.
        tokenizer: its folder in $OCTO_RUNS/tokenizers.
        data: the folder in $OCTO_RUNS with the sources that this tokenizer prepared.
    """
    return layout.of(
        MidTrainConfig(
            name=f"{name}-stable-200b",
            model=model,
            start=FromImport(path=run_folder("base") / name),
            data=MixtureConfig(
                sources=sources(STABLE_MIX, run_folder(data)),
                tokenizer=run_folder("tokenizers") / tokenizer,
                seq_length=SEQ_LENGTH,
            ),
            budget=budget(STABLE_STEPS),
            learning_rate=ConstantRate(peak=peak),
            save=SaveConfig(every_steps=1000, keep_every_tokens=10_000_000_000),  # branches may start there
        )
    )


def decay(parent: MidTrainConfig, branch: str) -> MidTrainConfig:
    """A branch of a stable stage: short, long or hybrid."""
    peak = parent.learning_rate.peak
    return replace(
        parent,
        name=f"{parent.name.removesuffix('stable-200b')}decay-{branch}",
        start=FromRun(run=parent.name),
        data=replace(parent.data, sources=sources(DECAY_MIX[branch], parent.data.sources[0].path.parent)),
        budget=replace(parent.budget, train_tokens=budget(DECAY_STEPS).train_tokens),
        learning_rate=CosineRate(peak=peak, floor=round(peak / 10, 9)),
        save=SaveConfig(every_steps=500),
    )


def sources(mix: Mapping[str, float], folder: Path) -> tuple[SourceConfig, ...]:
    """The sources of a mixture, as recipes/corpora.py prepares them."""
    return tuple(
        SourceConfig(name=name, path=folder / name, weight=weight, max_epochs=MAX_EPOCHS.get(name, 4.0))
        for name, weight in mix.items()
    )


def budget(steps: int) -> BudgetConfig:
    """So many steps of the paper's batch."""
    return BudgetConfig(train_tokens=steps * BATCH_SEQUENCES * SEQ_LENGTH, batch_sequences=BATCH_SEQUENCES)
