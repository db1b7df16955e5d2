"""OctoThinker in miniature: the whole road on two CPU cores, nothing to download.

Task: sums of three or four whole numbers up to 20, worked out in noisy steps. A Llama of 1M parameters
is mid-trained from random weights on 1.6M tokens at a constant rate, then on three decay branches of
0.5M tokens; each branch gets 30 steps of GRPO. Sizes, rates and mixtures are our own choice for two
cores; what they copy from the paper is the shape: one stable checkpoint, three branches, cosine to a
tenth, R1-Zero. It shows that the road works; it is no evidence about reasoning.

Hardware: 2 cores, 8 GiB. Time and accuracies: docs/benchmarks.md.

Every recipe here is `road(...)`, its `control(...)` or a stage of them; `road` takes what varies: the name that all
folders begin with, the seed, and whether questions keep their own answers.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_octo.config.data import (
    MixtureConfig,
    PrepareConfig,
    PrepareInput,
    SourceConfig,
    SyntheticConfig,
    Template,
    TokenizerConfig,
)
from megatron_octo.config.evaluate import EvaluateConfig, ScoredModel
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import PipelineConfig, RandomBaseConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.schedule import ConstantRate, CosineRate
from megatron_octo.config.train import (
    BudgetConfig,
    FromImport,
    FromRun,
    MidTrainConfig,
    PrecisionConfig,
    SaveConfig,
)
from megatron_octo.rundir import run_folder

NAME = "miniature"
TEMPLATES: dict[str, Template] = {"web": "text", "short": "question_answer", "long": "long_cot", "chat": "chat"}
DOCUMENTS = {"web": 30_000, "short": 30_000, "long": 10_000, "chat": 8_000}
BRANCHES = ("short", "long", "hybrid")

# Shares of each stage's tokens. The kinds of data are those of the paper's Tables 2 and 5; the shares are our own: so
# small a model needs more worked answers in the stable stage, and more web text to keep after it.
STABLE_MIX = {"web": 0.60, "short": 0.35, "chat": 0.05}
DECAY_MIX = {
    "short": {"web": 0.50, "short": 0.45, "chat": 0.05},
    "long": {"web": 0.50, "long": 0.45, "chat": 0.05},
    "hybrid": {"web": 0.50, "short": 0.225, "long": 0.225, "chat": 0.05},
}

SEQ_LENGTH = 128
BATCH_SEQUENCES = 8
PEAK = 2e-3
MODEL = ModelConfig(
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=512,
    vocab_size=384,
    tied_embeddings=True,
    rope_theta=10_000.0,
    max_positions=256,
)
MAX_RESPONSE_TOKENS = {"short": 64, "long": 112, "hybrid": 112}
RL_STEPS = 30
RL_PROMPTS_PER_STEP = 8


def stable() -> MidTrainConfig:
    """The stable stage: constant rate, mostly web text."""
    return _stable(NAME)


def decay_short() -> MidTrainConfig:
    """The branch of short answers."""
    return _decay(NAME, "short")


def decay_long() -> MidTrainConfig:
    """The branch of long answers with <think>."""
    return _decay(NAME, "long")


def decay_hybrid() -> MidTrainConfig:
    """The branch of both."""
    return _decay(NAME, "hybrid")


def rl_short() -> RLConfig:
    """GRPO on the short branch."""
    return _rl(NAME, "short")


def rl_long() -> RLConfig:
    """GRPO on the long branch."""
    return _rl(NAME, "long")


def rl_hybrid() -> RLConfig:
    """GRPO on the hybrid branch."""
    return _rl(NAME, "hybrid")


def pipeline() -> PipelineConfig:
    """The whole road: corpora, tokenizer, base, stable, three branches, RL, report."""
    return road()


def shuffled_answers() -> PipelineConfig:
    """The control: each question has the answer of another, so only the form can be learnt; no RL."""
    return control()


def road(
    name: str = NAME, *, seed: int = 0, branches: Sequence[str] = BRANCHES, shuffle_answers: bool = False
) -> PipelineConfig:
    """Every stage, in folders that begin with `name`; `seed` draws corpora, weights, data order and samples."""
    home = run_folder(name)
    decays = tuple(_decay(name, branch, seed) for branch in branches)
    rl = tuple(_rl(name, branch, seed) for branch in branches)
    return PipelineConfig(
        name=name,
        corpora=SyntheticConfig(
            output=home / "corpora",
            seed=seed,
            documents=tuple(DOCUMENTS.items()),
            num_rl_problems=RL_STEPS * RL_PROMPTS_PER_STEP,
            num_heldout_problems=400,
            shuffle_answers=shuffle_answers,
        ),
        tokenizer=TokenizerConfig(
            inputs=tuple(PrepareInput(input=_corpus(home, n), template=kind) for n, kind in TEMPLATES.items()),
            output=home / "tokenizer",
            vocab_size=MODEL.vocab_size,
        ),
        base=RandomBaseConfig(model=MODEL, tokenizer=home / "tokenizer", output=home / "base", seed=seed),
        base_folder=home / "base",
        import_folder=home / "base-megatron",
        prepare=tuple(
            PrepareConfig(
                name=source,
                input=_corpus(home, source),
                template=kind,
                tokenizer=home / "tokenizer",
                output=home / "data" / source,
                bos=False,  # RL prompts carry none either, so that both look alike
            )
            for source, kind in TEMPLATES.items()
        ),
        stable=_stable(name, seed),
        branches=decays,
        evaluate_before=_evaluate(home, {stage.name: _export(stage) for stage in (_stable(name, seed), *decays)}),
        rl=rl,
        evaluate_after=_evaluate(home, {each.name: each.output / "hf" for each in rl}),
        train_ranks=2,
    )


def control(name: str = NAME, *, seed: int = 0) -> PipelineConfig:
    """The control of `road(name, seed=seed)`."""
    shuffled = road(f"{name}-shuffled", seed=seed, branches=("short",), shuffle_answers=True)
    return replace(shuffled, rl=(), evaluate_after=None)


def _stable(name: str, seed: int = 0) -> MidTrainConfig:
    home = run_folder(name)
    return MidTrainConfig(
        name=f"{name}-stable",
        model=MODEL,
        start=FromImport(path=home / "base-megatron"),
        data=_mixture(home, STABLE_MIX, seed),
        budget=_budget(steps=1560),
        learning_rate=ConstantRate(peak=PEAK, warmup_tokens=20 * BATCH_SEQUENCES * SEQ_LENGTH),
        precision=PrecisionConfig(dtype="fp32"),
        save=SaveConfig(every_steps=390),
        log_every_steps=50,
        seed=seed,
    )


def _decay(name: str, branch: str, seed: int = 0) -> MidTrainConfig:
    return replace(
        _stable(name, seed),
        name=f"{name}-decay-{branch}",
        start=FromRun(run=f"{name}-stable"),
        data=_mixture(run_folder(name), DECAY_MIX[branch], seed),
        budget=_budget(steps=480),
        learning_rate=CosineRate(peak=PEAK, floor=PEAK / 10),
        save=SaveConfig(every_steps=240),
    )


def _rl(name: str, branch: str, seed: int = 0) -> RLConfig:
    return RLConfig(
        name=f"{name}-rl-{branch}",
        model=_export(_decay(name, branch, seed)),
        prompts=run_folder(name) / "corpora" / "rl_train.jsonl",
        output=run_folder(f"{name}-rl-{branch}"),
        num_steps=RL_STEPS,
        prompts_per_step=RL_PROMPTS_PER_STEP,
        learning_rate=1.5e-4,  # 5e-4 lowers greedy accuracy
        clip_high=0.28,
        stop=(),  # its responses end by themselves
        max_prompt_tokens=64,
        max_response_tokens=MAX_RESPONSE_TOKENS[branch],
        max_tokens_per_gpu=1024,  # one pack is one square of attention; larger packs are slower on a CPU
        num_gpus=1,
        save_every_steps=10,
        seed=seed,
    )


def _evaluate(home: Path, models: dict[str, Path]) -> EvaluateConfig:
    """Held-out problems, four samples each, for {run name: Hugging Face folder}."""
    return EvaluateConfig(
        task="heldout",
        problems=home / "corpora" / "heldout.jsonl",
        models=tuple(
            ScoredModel(model=model, output=run_folder(run) / "scores" / "heldout") for run, model in models.items()
        ),
        samples_per_problem=4,
        temperature=1.0,  # what RL trains on; greedy accuracy has no room left
        max_new_tokens=112,
    )


def _mixture(home: Path, weights: dict[str, float], seed: int = 0) -> MixtureConfig:
    return MixtureConfig(
        sources=tuple(SourceConfig(name=n, path=home / "data" / n, weight=w) for n, w in weights.items()),
        tokenizer=home / "tokenizer",
        seq_length=SEQ_LENGTH,
        shuffle_seed=seed,
    )


def _budget(steps: int) -> BudgetConfig:
    return BudgetConfig(
        train_tokens=steps * BATCH_SEQUENCES * SEQ_LENGTH,
        batch_sequences=BATCH_SEQUENCES,
        micro_batch_sequences=4,
    )


def _corpus(home: Path, name: str) -> Path:
    return home / "corpora" / f"{name}.jsonl"


def _export(stage: MidTrainConfig) -> Path:
    """The Hugging Face folder of a stage's last step."""
    return run_folder(stage.name) / "hf" / f"step_{stage.num_steps:08d}"
