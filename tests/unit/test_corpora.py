"""The manifests of the paper's corpora: all there, readable by what we have, and open about what nobody confirmed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePath

import pytest

from megatron_octo.config.base import from_dict, to_dict
from megatron_octo.config.data import PrepareConfig
from megatron_octo.config.load import load_recipe, recipe_functions
from megatron_octo.data.hub import HubFile, check_access
from megatron_octo.data.read import can_read
from megatron_octo.data.templates import FIELDS, renderer
from tests.conftest import REPOSITORY

FILE = REPOSITORY / "recipes" / "corpora.py"
NAMES = tuple(recipe_functions(FILE))
PAPER = {  # Tables 2 and 5, section 3 with its RL problems, MegaMath's whole web corpus, and AM's smaller twin
    "megamath_web_pro_max",
    "megamath_web_pro",
    "megamath_web",
    "megamath_qa",
    "megamath_text_code_block",
    "megamath_code",
    "megamath_translated_code",
    "dclm_baseline",
    "finemath_4plus",
    "open_math_instruct_2",
    "numina_math_1_5",
    "open_r1_math",
    "am_deepseek_distilled",
    "am_deepseek_r1_distilled_1_4m",
    "tulu_3_instruction_following",
    "wildchat",
    "ultrachat",
    "math8k",
}
TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
RECORDS = {  # a record as each data set lays it out, and the text that it becomes
    "open_math_instruct_2": ({"problem": "1+1?", "generated_solution": "2", "expected_answer": "2"}, "1+1?\n2"),
    "numina_math_1_5": ({"problem": "1+1?", "solution": "2", "answer": "2"}, "1+1?\n2"),
    "open_r1_math": (
        {
            "problem": "1+1?",
            "solution": "s",
            "generations": ["no", "<think>\nh\n</think>\n2"],
            "correctness_math_verify": [False, True],
        },
        "1+1?\n<think>\nh\n</think>\n2",
    ),
    "am_deepseek_distilled": ({"question": "1+1?", "answer": "<think>h</think>2"}, "1+1?\n<think>h</think>2"),
    "am_deepseek_r1_distilled_1_4m": (
        {
            "messages": [
                {"role": "user", "content": "1+1?", "info": {"reference_answer": "2"}},
                {"role": "assistant", "content": "<think>h</think><answer>2</answer>", "info": {}},
            ]
        },
        "1+1?\n<think>h</think><answer>2</answer>",
    ),
    "math8k": ({"problem": "1+1?", "answer": "2"}, "1+1?\n2"),
    "tulu_3_instruction_following": ({"messages": TURNS, "prompt": "1+1?"}, "User:1+1?\nAssistant:2"),
    "wildchat": ({"model": "gpt-4-0314", "conversation": TURNS}, "User:1+1?\nAssistant:2"),
    "ultrachat": ({"messages": TURNS, "prompt": "1+1?"}, "User:1+1?\nAssistant:2"),
}


@pytest.fixture(params=NAMES)
def config(request, runs) -> PrepareConfig:
    return load_recipe(f"{FILE}:{request.param}", PrepareConfig)


def render(config: PrepareConfig, record: object) -> str | None:
    made = renderer(config.template, columns=config.columns, chat_models=config.chat_models)(record)
    return made.text if made else None


def test_every_corpus_of_the_paper_has_a_manifest():
    assert set(NAMES) == PAPER


def test_names_and_outputs_are_their_own(runs):
    configs = [load_recipe(f"{FILE}:{name}", PrepareConfig) for name in NAMES]
    assert [config.name for config in configs] == [name.replace("_", "-") for name in NAMES]
    assert len({config.output for config in configs}) == len(configs)
    assert all(config.output.is_relative_to(runs) for config in configs)


def test_a_manifest_states_its_licence_and_what_nobody_confirmed(config):
    assert config.facts.licence and config.facts.source and config.facts.unconfirmed
    said = " ".join(config.facts.unconfirmed)
    assert all(sentence.endswith(".") for sentence in config.facts.unconfirmed)
    if "not stated" in config.facts.licence:
        assert "licence" in said
    if not re.fullmatch("[0-9a-f]{40}", config.hub.revision):
        assert "revision" in said
    if not config.facts.expected_tokens:
        assert "tokens" in said
    assert not config.hub.gated or "agree" in said
    assert config.facts.download_bytes
    if config.facts.download_bytes == pytest.approx(3.25 * (config.facts.expected_tokens or 0)):
        assert "download_bytes is an estimate" in said


def test_a_manifest_is_whole_as_json(config):
    assert from_dict(PrepareConfig, to_dict(config), origin="test") == config


def test_a_manifest_names_files_that_can_be_read(config):
    for pattern in config.hub.files:
        assert can_read(PurePath(pattern.rstrip("*"))), pattern


def test_columns_are_those_of_the_template(config):
    fields = {*FIELDS[config.template], *(("model",) if config.chat_models else ())}
    assert {field for field, _ in config.columns} <= fields


@pytest.mark.parametrize("name", sorted(PAPER - set(RECORDS)))
def test_texts_are_read_from_the_column_text(name, runs):
    config = load_recipe(f"{FILE}:{name}", PrepareConfig)
    assert render(config, {"text": "A theorem.", "url": "u"}) == "A theorem."


@pytest.mark.parametrize("name", RECORDS)
def test_records_become_the_papers_texts(name, runs):
    record, text = RECORDS[name]
    assert render(load_recipe(f"{FILE}:{name}", PrepareConfig), record) == text


def test_wildchat_keeps_gpt_4_only(runs):
    config = load_recipe(f"{FILE}:wildchat", PrepareConfig)
    assert render(config, {"model": "gpt-3.5-turbo-0301", "conversation": TURNS}) is None


def test_open_r1_math_keeps_what_was_judged_right_only(runs):
    config = load_recipe(f"{FILE}:open_r1_math", PrepareConfig)
    record = {"problem": "1+1?", "generations": ["3", "4"], "correctness_math_verify": [False, False]}
    assert render(config, record) is None


def test_a_manifest_with_nothing_left_to_read_needs_no_hub(config):
    check_access(config, [])
    assert replace(config, hub=None, input=config.output)  # what `fix` of the offline error proposes


def test_a_file_cannot_lie_outside_of_its_folder():
    for path in ("../a.parquet", "/a.parquet", "a/../../b.parquet", "a\\..\\b.parquet", ""):
        with pytest.raises(ValueError, match="has a file called"):
            HubFile(repository="a/b", commit="c", path=path, size_bytes=1, git_id="d")
