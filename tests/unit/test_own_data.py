"""The recipes for one's own files read the records that their docstrings show."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest

from megatron_octo.config.data import PrepareConfig
from megatron_octo.config.load import load_recipe, recipe_functions
from megatron_octo.data.indexed import read_documents
from megatron_octo.data.prepare import prepare
from megatron_octo.data.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY

FILE = REPOSITORY / "recipes" / "own_data.py"
RECORDS = {
    "stable_text": ({"text": "A theorem.", "source": "book"}, "A theorem."),
    "gsm8k": ({"question": "1+1?", "answer": "<<1+1=2>>2"}, "1+1?\n<<1+1=2>>2"),
    "math_hard": ({"problem": "1+1?", "level": "Level 5", "solution": "\\boxed{2}"}, "1+1?\n\\boxed{2}"),
    "openstax_exercises": ({"problem": "1+1?", "solution": "2", "instruction": "Add."}, "1+1?\n2"),
    "long_cot": ({"problem": "1+1?", "response": "<|begin_of_thought|>2", "gt": "2"}, "1+1?\n<|begin_of_thought|>2"),
}


def test_every_recipe_is_tried():
    assert set(recipe_functions(FILE)) == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_its_text(name, runs, tmp_path, tokenizer_folder):
    record, text = RECORDS[name]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    config = load_recipe(f"{FILE}:{name}", PrepareConfig, ["--input", str(tmp_path / "*.jsonl.gz")])
    assert config.facts.licence and config.output.is_relative_to(runs)
    prepare(replace(config, tokenizer=tokenizer_folder), num_workers=1)
    (ids,) = read_documents(config.output / "00000", 10)
    assert ids == [1, *load_tokenizer(tokenizer_folder).encode(text), 2]
