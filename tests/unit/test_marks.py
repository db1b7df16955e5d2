"""Control texts, answers, ids and held-out documents on disk: each what the records say, token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.indexed import read_documents
from megatron_octo.data.prepare import prepare
from megatron_octo.data.tokenizer import accelerated, load_tokenizer
from megatron_octo.errors import BadInput

TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "So 1+1=2."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "The answer is 4"},
]


def prepared(tmp_path: Path, rows: list[dict], tokenizer: Path, **options) -> PrepareConfig:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(
        name="a", input=tmp_path / "in.jsonl", tokenizer=tokenizer, output=tmp_path / "out", **options
    )
    prepare(config, num_workers=1)
    return config


def marked_texts(config: PrepareConfig) -> list[str]:
    """The text of the marked tokens of each document, `|` between spans."""
    tokenizer = load_tokenizer(config.tokenizer)
    marks, texts, at = np.fromfile(config.output / "00000.loss", np.uint8), [], 0
    for ids in read_documents(config.output / "00000", 10**6):
        own = marks[at : at + len(ids)]
        at += len(ids)
        spans = np.flatnonzero(np.diff(np.concatenate([[0], own, [0]])))
        texts.append("|".join(tokenizer.decode(ids[a:b]) for a, b in spans.reshape(-1, 2)))
    assert at == len(marks)
    return texts


@pytest.mark.parametrize(
    ("template", "row", "marked"),
    [
        ("question_answer", {"question": "1+1?", "answer": "2"}, "2</s>"),
        (
            "long_cot",
            {"question": "1+1?", "thinking": "1+1=2", "answer": "2"},
            "<think>\n1+1=2\n</think>\n2</s>",
        ),
        ("chat", {"messages": TURNS}, "So 1+1=2.|The answer is 4</s>"),
        ("chat", {"messages": TURNS[:3]}, "So 1+1=2."),
    ],
)
def test_answers_are_marked_and_with_the_last_one_the_end_of_the_text(
    template, row, marked, tmp_path, tokenizer_folder
):
    config = prepared(tmp_path, [row, row], tokenizer_folder, template=template, mark_answers=True)
    assert marked_texts(config) == [marked, marked]


TEXT = st.text(alphabet=st.sampled_from("ab 1+=\n<s>/\u00e9\U0001f600"), min_size=1, max_size=20).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_any_text_comes_back_whole_and_its_answer_marked(rows, tmp_path_factory, tokenizer_folder):
    records = [{"question": question, "answer": answer, "id": at} for at, (question, answer) in enumerate(rows)]
    config = prepared(
        tmp_path_factory.mktemp("a"),
        records,
        tokenizer_folder,
        template="question_answer",
        mark_answers=True,
        id_column="id",
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [tokenizer.decode(ids[1:-1]) for ids in read_documents(config.output / "00000", 100)]
    assert texts == [f"{question}\n{answer}" for question, answer in rows]
    # a line break is a token of its own in this tokenizer, so the border is exact
    assert marked_texts(config) == [f"{answer}</s>" for _, answer in rows]
    assert (config.output / "00000.ids").read_text().split() == [str(at) for at in range(len(rows))]


def test_control_texts_are_letters_and_counted_or_refused(tmp_path, tokenizer_folder):
    rows = [{"text": "a </s><s> b </s>"}, {"text": "plain"}]
    config = prepared(tmp_path, rows, tokenizer_folder, template="text")
    first, _ = read_documents(config.output / "00000", 2)
    assert set(first[1:-1]).isdisjoint({0, 1, 2, 3})
    assert prepare(config).control_texts == (("</s>", 2), ("<s>", 1))
    with pytest.raises(BadInput, match=r"line 1: spells the control token </s>"):
        prepare(replace(config, output=tmp_path / "other", control_text="bad"))


def test_a_tokenizer_whose_unknown_token_ends_documents_is_refused_at_a_text_that_has_it(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words.save(str(folder / "tokenizer.json"))
    options = {"template": "text", "bos": False, "eos_token": "</s>"}
    with pytest.raises(BadInput, match=r"control id 0 for ordinary text, in 'a unheard a'"):
        prepared(tmp_path, [{"text": "a a"}, {"text": "a unheard a"}], folder, **options)
    assert prepare(prepared(tmp_path, [{"text": "a a"}], folder, **options)).tokens == 3


def test_held_out_documents_stay_so_when_the_corpus_grows(tmp_path, tokenizer_folder):
    rows = [{"text": f"document number {number}"} for number in range(400)]
    tokenizer = load_tokenizer(tokenizer_folder)

    def split(name: str, count: int) -> tuple[set[str], set[str]]:
        folder = tmp_path / name
        folder.mkdir()
        config = prepared(folder, rows[:count], tokenizer_folder, template="text", validation_share=0.1)
        found = [
            {tokenizer.decode(ids[1:-1]) for ids in read_documents(config.output / prefix, 1000)}
            for prefix in ("00000", "validation_00000")
        ]
        return found[0], found[1]

    train, held_out = split("small", 200)
    more_train, more_held_out = split("large", 400)
    assert train < more_train
    assert held_out < more_held_out
    assert not more_train & more_held_out
    assert 15 < len(more_held_out) < 75


def test_the_fast_engine_is_used_only_where_it_agrees(tokenizer_folder, monkeypatch, caplog):
    tokenizer = load_tokenizer(tokenizer_folder)
    caplog.set_level("INFO", logger="megatron_octo")

    class Wrong:
        def encode_batch(self, texts, parallel):
            import awkward

            return awkward.Array([[1, 2, 3] for _ in texts])

    assert accelerated(replace(tokenizer, fast=Wrong), ["a"]).engine == tokenizer.engine
    assert "gigatoken differs" in caplog.text

    def failing():
        raise BaseException("a panic")

    assert accelerated(replace(tokenizer, fast=failing), ["a"]).engine == tokenizer.engine
    assert "gigatoken does not take this one" in caplog.text
