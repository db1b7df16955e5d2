"""The full-size recipes: the paper's numbers, whole on every stated number of GPUs, and within their memory."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from megatron_octo.budget.saves import is_due, superseded
from megatron_octo.config.data import PrepareConfig
from megatron_octo.config.load import load_recipe, read_recipes
from megatron_octo.config.train import FromImport, FromRun, MidTrainConfig
from megatron_octo.data import mix
from megatron_octo.plan.memory import GPU_GIB, rank_memory
from tests.conftest import REPOSITORY

RECIPES = REPOSITORY / "recipes"
PARAMETERS = {  # as published: 1.24B, 3.21B, 8.03B; 1.54B, 3.09B, 7.62B
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "llama31_8b": 8_030_261_248,
    "qwen25_1_5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
}
RATES = {"llama32_1b": 5e-5, "llama32_3b": 2e-5, "llama31_8b": 1e-5}
MIXTURES = {  # the paper's Tables 2 and 5
    "stable_200b": {
        "megamath-web-pro-max": 0.725,
        "dclm-baseline": 0.10,
        "megamath-text-code-block": 0.10,
        "megamath-qa": 0.05,
        "megamath-code": 0.0125,
        "megamath-translated-code": 0.0125,
    },
    "decay_short": {
        "megamath-web-pro": 0.55,
        "dclm-baseline": 0.05,
        "instructions": 0.10,
        "megamath-qa": 0.025,
        "open-math-instruct-2": 0.175,
        "numina-math-1-5": 0.10,
    },
    "decay_long": {
        "megamath-web-pro": 0.55,
        "dclm-baseline": 0.05,
        "instructions": 0.10,
        "open-r1-math": 0.15,
        "am-deepseek-distilled": 0.15,
    },
    "decay_hybrid": {
        "megamath-web-pro": 0.55,
        "dclm-baseline": 0.05,
        "instructions": 0.10,
        "open-math-instruct-2": 0.10,
        "numina-math-1-5": 0.10,
        "open-r1-math": 0.10,
    },
}
CONTROLLED = {  # the paper's controlled experiments
    "web_finemath": {"finemath-4plus": 1.0},
    "web_pro": {"megamath-web-pro": 1.0},
    "web_pro_max": {"megamath-web-pro-max": 1.0},
    "web_pro_max_100b": {"megamath-web-pro-max": 1.0},
    "short_cot": {"megamath-web-pro": 0.9, "megamath-qa": 0.1},
    "long_cot": {"megamath-web-pro": 0.9, "open-r1-math": 0.1},
    "short_cot_instructions": {"megamath-web-pro": 0.89, "megamath-qa": 0.1, "instructions": 0.01},
    "long_cot_instructions": {"megamath-web-pro": 0.89, "open-r1-math": 0.1, "instructions": 0.01},
}
INSTRUCTIONS = ("tulu-3-instruction-following", "wildchat", "ultrachat")
WORLD_SIZES = (8, 64, 256)
MOST_MEMORY = 0.90
BRANCHES = tuple(MIXTURES)[1:]
FULL_SIZE = [f"{file}.py:{stage}" for file in PARAMETERS for stage in MIXTURES]
ABLATIONS = [f"ablations.py:{name}" for name in read_recipes(RECIPES / "ablations.py").functions]


@pytest.fixture(autouse=True)
def _runs(runs: Path) -> None:
    """Every recipe looks into an empty folder of runs."""


def load(spec: str) -> MidTrainConfig:
    return load_recipe(f"{RECIPES}/{spec}", MidTrainConfig)


def weights(config: MidTrainConfig) -> dict[str, float]:
    """The mixture, the instruction pool as one."""
    shares = {source.name: source.weight for source in config.data.sources}
    pool = [shares.pop(name) for name in INSTRUCTIONS if name in shares]
    return {**shares, **({"instructions": pytest.approx(sum(pool))} if pool else {})}


@pytest.mark.parametrize("file", PARAMETERS)
def test_a_model_has_as_many_parameters_as_published(file):
    assert load(f"{file}.py:stable_200b").model.num_parameters == PARAMETERS[file]


@pytest.mark.parametrize("spec", FULL_SIZE)
def test_a_mixture_is_that_of_the_papers_table(spec):
    assert weights(load(spec)) == MIXTURES[spec.split(":")[1]]


@pytest.mark.parametrize("spec", FULL_SIZE)
def test_a_budget_is_the_papers_to_the_token(spec):
    config = load(spec)
    assert (config.budget.batch_sequences, config.data.seq_length) == (512, 8192)
    expected = (50_000, 209_715_200_000) if spec.endswith("stable_200b") else (5_000, 20_971_520_000)
    assert (config.num_steps, config.budget.train_tokens) == expected


@pytest.mark.parametrize("file", PARAMETERS)
def test_a_branch_starts_from_stable_at_its_rate_and_ends_at_a_tenth(file):
    stable = load(f"{file}.py:stable_200b")
    assert isinstance(stable.start, FromImport)
    assert stable.learning_rate.kind == "constant"
    assert stable.learning_rate.peak == RATES.get(file, stable.learning_rate.peak)
    for branch in (load(f"{file}.py:{name}") for name in BRANCHES):
        assert branch.start == FromRun(run=stable.name)
        assert branch.learning_rate.kind == "cosine"
        assert branch.learning_rate.peak == stable.learning_rate.peak
        assert branch.learning_rate.floor == pytest.approx(stable.learning_rate.peak / 10)
        assert (branch.model, branch.optimizer, branch.parallel) == (stable.model, stable.optimizer, stable.parallel)


def test_every_run_has_a_name_of_its_own():
    names = [load(spec).name for spec in (*FULL_SIZE, *ABLATIONS)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("spec", [*FULL_SIZE, *ABLATIONS])
def test_a_recipe_reads_what_the_corpora_write_and_no_more_often_than_its_caps_allow(spec):
    config = load(spec)
    corpora = [
        load_recipe(f"{RECIPES}/corpora.py:{s.name.replace('-', '_')}", PrepareConfig) for s in config.data.sources
    ]
    if not spec.startswith("qwen"):
        assert [source.path for source in config.data.sources] == [corpus.output for corpus in corpora]
        assert all(corpus.tokenizer == config.data.tokenizer for corpus in corpora)
    known = [corpus.facts.expected_tokens or config.budget.train_tokens for corpus in corpora]
    mix.check_repeats(mix.plan(config.data, available=known, train_tokens=config.budget.train_tokens))


@pytest.mark.parametrize("spec", [*FULL_SIZE, *ABLATIONS])
def test_a_recipe_resolves_on_every_stated_number_of_gpus_and_leaves_a_tenth_of_their_memory(spec):
    for gpu, ranks in product(GPU_GIB, WORLD_SIZES):
        config = load(f"{spec}@{gpu}")
        memory = rank_memory(config, config.resolve(ranks))
        assert memory.total_gib <= MOST_MEMORY * GPU_GIB[gpu], memory.arithmetic()


@pytest.mark.parametrize("file", [*PARAMETERS, "ablations"])
def test_a_file_has_a_layout_for_every_gpu_and_its_recipes_take_the_first(file):
    recipes = read_recipes(RECIPES / f"{file}.py")
    assert list(recipes.layouts) == list(GPU_GIB)
    assert all(function() == recipes.layouts["h100"].of(function()) for function in recipes.functions.values())


@pytest.mark.parametrize("spec", ["llama32_3b.py:stable_200b", "llama31_8b.py:stable_200b", "qwen25_7b.py:stable_200b"])
def test_an_80_gb_layout_fits_in_bf16_too(spec):
    config = load_recipe(f"{RECIPES}/{spec}", MidTrainConfig, ["--precision.fp8", "off"])
    assert rank_memory(config, config.resolve(8)).total_gib <= MOST_MEMORY * GPU_GIB["h100"]


def test_the_pilots_branch_at_the_first_save_beyond_130b_tokens():
    pilots = [config for config in map(load, ABLATIONS) if isinstance(config.start, FromRun)]
    stable = load("llama32_3b.py:stable_200b")
    every = stable.save.every_steps * stable.batch_tokens
    assert len(pilots) == 15
    for pilot in pilots:
        assert pilot.start.run == stable.name
        assert 0 <= pilot.start.step * stable.batch_tokens - 130e9 < every
        assert pilot.start.step % stable.save.every_steps == 0
        assert weights(pilot)["dclm-baseline"] == 0.05 and weights(pilot)["instructions"] == 0.10


@pytest.mark.parametrize(("name", "share"), [("qa_10", 0.1), ("omi2_40", 0.4), ("openr1_15_omi2_15", 0.3)])
def test_what_a_pilot_gives_to_questions_it_takes_from_the_web(name, share):
    assert weights(load(f"ablations.py:{name}"))["megamath-web-pro"] == pytest.approx(0.85 - share)


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlled_run_reads_the_papers_mixture(name):
    assert weights(load(f"ablations.py:{name}")) == CONTROLLED[name]


def test_the_run_of_100b_tokens_keeps_the_saves_nearest_to_20b_70b_and_100b():
    run = load("ablations.py:web_pro_max_100b")
    tokens = run.batch_tokens
    kept: list[int] = []
    for step in range(1, run.num_steps + 1):
        marked = run.marks.reached((step - 1) * tokens, step * tokens)
        if marked or step == run.num_steps or is_due(run.save, step, batch_tokens=tokens):
            kept.append(step)
            gone = superseded(run.save, kept, batch_tokens=tokens)
            kept = [each for each in kept if each not in gone]
    wanted = [round(billions * 1e9 / tokens) for billions in (20, 70, 100)]
    assert set(wanted) <= set(kept)
    assert [step for step in kept if run.marks.reached((step - 1) * tokens, step * tokens)] == wanted


def test_the_controlled_runs_start_from_the_base_with_the_papers_cosine():
    runs = [config for config in map(load, ABLATIONS) if isinstance(config.start, FromImport)]
    assert len(runs) == len(CONTROLLED)
    for run in runs:
        assert (run.learning_rate.kind, run.learning_rate.peak, run.learning_rate.floor) == ("cosine", 3e-5, 3e-6)
        nominal = 100e9 if run.name.endswith("100b") else 20e9
        assert abs(run.budget.train_tokens - nominal) <= run.batch_tokens / 2


def layout_row(file: str, gpu: str) -> str:
    """A row of the table of layouts in docs/training.md."""
    config = load(f"{file}.py:stable_200b@{gpu}")
    p, fp8 = config.parallel, config.precision.fp8
    cut = f"{p.tensor}{' + sequence' if p.sequence else ''} / {p.pipeline} / {p.context}"
    gib = " / ".join(f"{rank_memory(config, config.resolve(ranks)).total_gib:.0f}" for ranks in WORLD_SIZES)
    precision = "BF16" if fp8 == "off" else f"FP8 {fp8}"
    micro_batch = config.budget.micro_batch_sequences
    compute = config.compute.recompute
    return f"| `{file}` | {gpu} | {cut} | {micro_batch} | {compute} | {precision} | {gib} of {GPU_GIB[gpu]} |"


@pytest.mark.parametrize(("file", "gpu"), [*product(PARAMETERS, GPU_GIB)])
def test_the_documents_table_of_layouts_is_what_the_files_say(file, gpu):
    assert layout_row(file, gpu) in (REPOSITORY / "docs" / "training.md").read_text().splitlines()
