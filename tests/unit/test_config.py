"""Settings: strict JSON, refused contradictions, recipes that load."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo.config.base import Settings, fingerprint, from_dict, to_dict
from megatron_octo.config.load import load_recipe, recipe_functions
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.schedule import ConstantRate, CosineRate, LinearRate, MinusSqrtRate, WSDRate
from megatron_octo.config.train import FromRun, MidTrainConfig, ParallelConfig
from megatron_octo.errors import BadInput, SettingsError
from tests.conftest import REPOSITORY

RECIPES = [
    f"{path}:{name}" for path in sorted((REPOSITORY / "recipes").glob("*.py")) for name in recipe_functions(path)
]
MINIATURE = str(REPOSITORY / "recipes" / "miniature.py")


@pytest.fixture
def stable() -> MidTrainConfig:
    return load_recipe(f"{MINIATURE}:stable", MidTrainConfig)


@pytest.mark.parametrize("spec", RECIPES)
def test_every_shipped_recipe_loads_and_survives_json(spec):
    settings = load_recipe(spec, Settings)
    again = from_dict(type(settings), to_dict(settings), origin="a test")
    assert again == settings
    assert fingerprint(again) == fingerprint(settings)


def test_unknown_keys_and_wrong_types_in_json_are_refused(stable):
    value = to_dict(stable)
    with pytest.raises(BadInput, match="sede"):
        from_dict(MidTrainConfig, {**value, "sede": 1}, origin="a test")
    with pytest.raises(BadInput, match="seed"):
        from_dict(MidTrainConfig, {**value, "seed": "many"}, origin="a test")


def test_overrides_reach_nested_fields_and_kinds_stay_the_recipes(stable):
    changed = load_recipe(f"{MINIATURE}:stable", MidTrainConfig, ["--learning-rate.peak", "1e-3", "--seed", "7"])
    assert changed == replace(stable, learning_rate=replace(stable.learning_rate, peak=1e-3), seed=7)


def test_an_override_is_checked_like_the_recipe_itself():
    with pytest.raises(SystemExit) as end:
        load_recipe(f"{MINIATURE}:stable", MidTrainConfig, ["--model.num-heads", "5"])
    assert end.value.code == 2


def test_the_plan_divides_the_batch_among_ranks(stable):
    plan = stable.resolve(world_size=2)
    assert (plan.data_ranks, plan.num_micro_batches) == (2, 1)
    assert plan.num_steps * plan.batch_tokens == stable.budget.train_tokens
    with pytest.raises(SettingsError, match="does not divide by 3 data-parallel"):
        stable.resolve(world_size=3)
    with pytest.raises(SettingsError, match="whole copies"):
        replace(stable, parallel=ParallelConfig(tensor=2)).resolve(world_size=3)


def test_interleaving_needs_micro_batches_that_divide_by_the_pipeline(stable):
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    interleaved = replace(stable, parallel=parallel, budget=replace(stable.budget, micro_batch_sequences=8))
    with pytest.raises(SettingsError, match="1 micro-batches"):
        interleaved.resolve(world_size=2)


def test_a_parameter_count_equals_the_published_one():
    # Meta's model cards: 1.24B for Llama-3.2-1B.
    llama32_1b = ModelConfig(
        hidden_size=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        ffn_size=8192,
        vocab_size=128_256,
        tied_embeddings=True,
        rope_factor=32.0,
    )
    assert llama32_1b.num_parameters == 1_235_814_400


def test_a_decay_starts_at_the_rate_and_from_the_run_that_stable_is():
    pipeline = load_recipe(MINIATURE, PipelineConfig)
    for branch in pipeline.branches:
        assert branch.learning_rate.peak == pipeline.stable.learning_rate.peak
        assert branch.learning_rate.floor == pytest.approx(branch.learning_rate.peak / 10)
        assert branch.start.run == pipeline.stable.name


@pytest.mark.parametrize(
    "rate",
    [
        ConstantRate(peak=1.0, warmup_tokens=5),
        CosineRate(peak=1.0, floor=0.5),
        LinearRate(peak=1.0, floor=0.5),
        MinusSqrtRate(peak=1.0, floor=0.5),
        WSDRate(peak=1.0, floor=0.5, decay_tokens=1000, shape="linear"),
    ],
)
def test_every_curve_survives_json(stable, rate):
    optimizer = replace(stable.optimizer, weight_decay_over_tokens=rate)
    config = replace(stable, learning_rate=rate, optimizer=optimizer)
    assert from_dict(MidTrainConfig, to_dict(config), origin="a test") == config


def test_a_curve_longer_than_the_budget_is_refused(stable):
    longer = WSDRate(peak=1.0, floor=0.0, warmup_tokens=1024, decay_tokens=stable.budget.train_tokens)
    with pytest.raises(SettingsError, match=r"learning_rate: .* take 1,598,464 tokens, more than .* 1,597,440"):
        replace(stable, learning_rate=longer)
    with pytest.raises(SettingsError, match=r"optimizer\.weight_decay_over_tokens: "):
        replace(stable, optimizer=replace(stable.optimizer, weight_decay_over_tokens=longer))


def test_a_parents_save_is_named_once():
    with pytest.raises(SettingsError, match=r"start\.step 5 and start\.tokens 10"):
        FromRun(run="stable", step=5, tokens=10)


def test_two_stages_of_one_name_are_refused():
    pipeline = load_recipe(MINIATURE, PipelineConfig)
    with pytest.raises(SettingsError, match="share a name"):
        replace(pipeline, branches=(pipeline.stable,))


def test_a_recipe_that_fails_is_bad_input_with_its_reason(tmp_path):
    path = Path(tmp_path / "broken.py")
    path.write_text("from megatron_octo.config.model import ModelConfig\ndef m() -> ModelConfig:\n    return 1 / 0\n")
    with pytest.raises(BadInput, match="ZeroDivisionError"):
        load_recipe(f"{path}:m", ModelConfig)
    path.write_text("def m(:\n")
    with pytest.raises(BadInput, match="SyntaxError"):
        load_recipe(f"{path}:m", ModelConfig)


def test_a_recipe_imports_the_files_beside_it_whatever_another_folder_has(tmp_path):
    text = "from shared import MODEL\nfrom megatron_octo.config.model import ModelConfig\n"
    text += "def m() -> ModelConfig:\n    return MODEL\n"
    path, modules = list(sys.path), set(sys.modules)
    for folder, layers in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.py").write_text(text)
        model = f"hidden_size=8, num_layers={layers}, num_heads=1, num_kv_heads=1, ffn_size=8, vocab_size=8"
        shared = "from megatron_octo.config.model import ModelConfig\n"
        (tmp_path / folder / "shared.py").write_text(f"{shared}MODEL = ModelConfig({model}, tied_embeddings=True)\n")
        assert load_recipe(f"{tmp_path / folder / 'recipe.py'}:m", ModelConfig).num_layers == layers
    assert sys.path == path
    assert {name for name in set(sys.modules) - modules if name != "octo_recipe_recipe"} == set()


def test_a_recipe_is_laid_out_for_the_gpu_it_names_and_options_go_on_top():
    spec = str(REPOSITORY / "recipes" / "llama31_8b.py:decay_long")
    default, h200 = load_recipe(spec, MidTrainConfig), load_recipe(f"{spec}@h200", MidTrainConfig)
    assert (default.parallel.tensor, h200.parallel.tensor) == (2, 1)
    assert load_recipe(f"{spec}@h100", MidTrainConfig) == default
    assert replace(h200, parallel=default.parallel, precision=default.precision) == default
    both = load_recipe(f"{spec}@b200", MidTrainConfig, ["--budget.micro-batch-sequences", "4"])
    assert (both.precision.fp8, both.budget.micro_batch_sequences) == ("mxfp8", 4)


@pytest.mark.parametrize(
    ("spec", "told"),
    [("llama31_8b.py:stable_200b@h20", "h100, h200, b200"), ("miniature.py:stable@h100", "choose among: none")],
)
def test_a_gpu_without_a_layout_is_refused_with_those_that_have_one(spec, told):
    with pytest.raises(BadInput, match="has no layout for") as refused:
        load_recipe(str(REPOSITORY / "recipes" / spec), MidTrainConfig)
    assert told in refused.value.fix


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("beta2", 1.5),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("clip_norm", -1.0),
        ("clip_norm", float("nan")),
    ],
)
def test_numbers_that_adamw_cannot_use_are_refused(stable, name, wrong):
    with pytest.raises(SettingsError, match=rf"optimizer\.{name} {wrong:g} is"):
        replace(stable.optimizer, **{name: wrong})


def test_context_parallelism_does_not_cut_at_documents(stable):
    context = replace(stable, parallel=ParallelConfig(context=2))
    with pytest.raises(SettingsError, match=r"across_documents is off with parallel\.context 2"):
        replace(context, data=replace(context.data, across_documents=False))
