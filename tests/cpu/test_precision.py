"""FP8's numerics by emulation, and activations computed again: small runs of one rank, their losses compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.schedule import ConstantRate
from megatron_octo.config.train import BudgetConfig, ComputeConfig, MidTrainConfig, ParallelConfig, PrecisionConfig
from megatron_octo.model import fp8_emulation
from tests.cpu.zygote import Zygote, octo, rows
from tests.prepared import MODEL, SEQ_LENGTH, stage, write_data

BAR = 0.01  # of BF16's loss
WIDER = replace(MODEL, hidden_size=64, ffn_size=128, head_dim=0)
BATCH = 8
BARE = "bare E4M3"
Train = Callable[..., list[tuple[float, ...]]]

pytestmark = pytest.mark.timeout(900)


def without_scales() -> None:
    """From now on tensorwise is bare E4M3."""
    fp8_emulation.RECIPES["tensorwise"] = fp8_emulation.Recipe(scaled=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data are, the runs and their log."""
    folder = tmp_path_factory.mktemp("precision")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def train(folder: Path, zygote: Zygote) -> Train:
    """Train a small stage with these settings changed; the steps, losses and norms of its metrics. Once each."""

    def run(name: str, steps: int, *, bare: bool = False, ranks: int = 1, **changes: object) -> list[tuple[float, ...]]:
        name = f"{name}-{steps}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OCTO_RUNS", str(folder / "runs"))
            small = stage(folder / "data", name, steps=steps, save_every=steps)
            config: MidTrainConfig = replace(
                small,
                model=WIDER,
                budget=BudgetConfig(
                    train_tokens=steps * BATCH * SEQ_LENGTH, batch_sequences=BATCH, micro_batch_sequences=BATCH // ranks
                ),
                learning_rate=ConstantRate(peak=1e-3),
                **changes,  # type: ignore[arg-type]
            )
            if not rundir.is_done(rundir.run_folder(name)):
                before = ["tests.cpu.test_precision:without_scales"] if bare else []
                codes = octo(zygote, config, folder, ranks=ranks, before=before).wait()
                assert set(codes) == {0}, (folder / "log").read_text()[-3000:]
            return rows(rundir.run_folder(name))

    return run


def loss_beyond_bf16(train: Train, recipe: str, steps: int) -> float:
    """How much higher the mean loss of the last quarter is than BF16's, as a share of it."""

    def mean(taken: list[tuple[float, ...]]) -> float:
        return statistics.mean(row[2] for row in taken[-steps // 4 :])

    bf16 = train("bf16", steps, precision=PrecisionConfig(dtype="bf16"))
    emulated = PrecisionConfig(dtype="bf16", fp8="tensorwise" if recipe == BARE else recipe, fp8_emulation=True)
    fp8 = train(recipe.replace(" ", "-"), steps, precision=emulated, bare=recipe == BARE)
    assert fp8[0][2:] != bf16[0][2:], "nothing was rounded"
    return mean(fp8) / mean(bf16) - 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", fp8_emulation.RECIPES)
def test_after_200_steps_each_recipe_is_within_1_percent_of_bf16(recipe, train):
    assert loss_beyond_bf16(train, recipe, 200) <= BAR


@pytest.mark.slow
def test_after_200_steps_e4m3_without_scales_is_not(train):
    assert loss_beyond_bf16(train, BARE, 200) > BAR


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_some_steps_of_a_recipe_are_within_1_percent_of_bf16(recipe, train):
    assert loss_beyond_bf16(train, recipe, 40) <= BAR


def test_layers_left_in_bf16_are_not_rounded(train):
    bf16 = train("bf16", 10, precision=PrecisionConfig(dtype="bf16"))
    fp8 = PrecisionConfig(dtype="bf16", fp8="tensorwise", fp8_emulation=True)
    ends = train("ends", 10, precision=replace(fp8, bf16_first_layers=1, bf16_last_layers=1))
    whole = train("whole", 10, precision=replace(fp8, bf16_first_layers=2, bf16_last_layers=2))
    assert whole == bf16
    assert ends != bf16
    assert ends != train("none", 10, precision=fp8)


def test_delayed_scales_are_those_of_all_data_parallel_ranks(train):
    fp8 = PrecisionConfig(dtype="bf16", fp8="delayed", fp8_emulation=True)
    alone, two = train("one", 10, precision=fp8), train("two", 10, ranks=2, precision=fp8, parallel=ParallelConfig())
    assert [row[2] for row in two] == pytest.approx([row[2] for row in alone], rel=2e-3)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2, sequence=True)], ids=["one", "tp2-sp"])
def test_activations_computed_again_change_no_bit(recompute, parallel, train):
    fp32, ranks = PrecisionConfig(dtype="fp32"), parallel.tensor
    kept = train(f"kept-{ranks}", 6, ranks=ranks, precision=fp32, parallel=parallel)
    compute = ComputeConfig(recompute=recompute)
    name = f"{recompute}-{ranks}"
    assert train(name, 6, ranks=ranks, precision=fp32, parallel=parallel, compute=compute) == kept


def test_a_stage_trains_in_bf16_and_says_so_where_fp8_is_missing(train, folder):
    bf16 = train("bf16", 10, precision=PrecisionConfig(dtype="bf16"))
    fallback = PrecisionConfig(dtype="bf16", fp8="tensorwise", fp8_fallback=True)
    assert train("fallback", 10, precision=fallback) == bf16
    assert "training in bf16: precision.fp8 tensorwise needs a GPU" in (folder / "log").read_text()
