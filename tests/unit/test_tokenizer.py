"""One tokenizer in two forms that agree, and text that stays text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_octo.data.read import read_records
from megatron_octo.data.tokenizer import accelerated, check_vocabulary, load_tokenizer
from megatron_octo.data.tokenizer_training import train_tokenizer
from megatron_octo.errors import BadInput
from tests.conftest import snapshot

PIECES = [
    "The answer is",
    " \\boxed{",
    "}",
    "<think>",
    "</think>",
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "<0x0A>",
    "\n",
    "\t",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def processor(tokenizer_folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))


def test_both_forms_agree_on_every_document_and_lose_nothing(tokenizer, processor, texts):
    assert len(texts) == 4000
    ids = tokenizer.encode_batch(texts)
    assert ids == processor.encode(texts)
    assert [tokenizer.decode(each) for each in ids] == texts


@given(
    st.one_of(
        st.text(max_size=40), st.lists(st.sampled_from(PIECES + list("aehinst 0123+=")), max_size=40).map("".join)
    )
)
@example("  two leading, two  inside, two trailing  ")
@example("\n\n a\n")
@example("caf\u00e9 \U0001f600 \u4e2d\u6587 e\u0301 \u200b\ufeff\r\n\x00")
def test_both_forms_agree_on_any_text_and_lose_nothing(tokenizer, processor, text):
    ids = tokenizer.encode(text)
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")  # SentencePiece's own spelling of a space


def test_literal_control_tokens_are_text(tokenizer):
    ids = tokenizer.encode("<unk><s></s><pad>")
    assert min(ids) > 3
    assert tokenizer.decode(ids) == "<unk><s></s><pad>"


def test_digits_and_line_breaks_are_single_and_merge_with_nothing(tokenizer, processor):
    pieces = [processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    several = [piece for piece in pieces if len(piece) > 1 and not piece.startswith("<0x")]
    assert any("The" in piece for piece in several)
    assert not any(char.isdigit() or char == "\n" for piece in several for char in piece)
    assert len(tokenizer.encode("2026\n\n")) == 6


def test_a_prompt_is_a_prefix_in_tokens_of_the_document_that_it_begins(tokenizer, corpora):
    for row in read_records(corpora / "heldout.jsonl"):
        prompt = tokenizer.encode(row["input"])
        for answer in ("<think>\n1+2=3", "The answer is 3.", "12+2=14"):
            assert tokenizer.encode(row["input"] + answer)[: len(prompt)] == prompt


def test_the_ids_are_those_that_the_folder_states(tokenizer, tokenizer_folder):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (384, 1, 2)
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "</s>", "<pad>")


def test_equal_inputs_give_equal_bytes(tokenizer_config, tokenizer_folder, tmp_path):
    train_tokenizer(replace(tokenizer_config, output=tmp_path / "again"))
    first, again = snapshot(tokenizer_folder), snapshot(tmp_path / "again")
    files = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    assert [first[file] for file in files] == [again[file] for file in files]


@pytest.mark.parametrize(("vocab_size", "message"), [(280, "smaller than required_chars"), (5000, "too high")])
def test_a_vocabulary_that_cannot_be_had_is_refused(tokenizer_config, tmp_path, vocab_size, message):
    with pytest.raises(BadInput, match=rf"{vocab_size:,}[\s\S]*{message}"):
        train_tokenizer(replace(tokenizer_config, output=tmp_path / "out", vocab_size=vocab_size))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_only_tokenizer_model_encodes_the_same(tokenizer, tokenizer_folder, tmp_path, texts):
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    other = load_tokenizer(tmp_path)
    assert other.encode_batch(texts[:100]) == tokenizer.encode_batch(texts[:100])
    assert (other.vocab_size, other.bos_id, other.eos_id) == (384, 1, 2)
    assert other.decode(other.encode("a\n b")) == "a\n b"
    assert min(other.encode("</s>")) > 3
    assert accelerated(other, texts[:50]).engine == "gigatoken"


def test_a_folder_with_only_tokenizer_json_needs_no_config(tokenizer, tokenizer_folder, tmp_path, texts):
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    other = load_tokenizer(tmp_path)
    assert other.encode_batch(texts[:100]) == tokenizer.encode_batch(texts[:100])
    assert other.eos_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(tmp_path).eos_id == 2


def test_padding_truncation_and_added_control_tokens_of_a_given_tokenizer_are_off(tokenizer_folder, tmp_path):
    import tokenizers

    given_tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    given_tokenizer.enable_truncation(4)
    given_tokenizer.enable_padding(length=50)
    given_tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    given_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The answer is 12."
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(tokenizer_folder).encode(text)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(BadInput, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_tokenizer_model_of_another_make_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(BadInput, match="tiktoken file of 2 ranks"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("something else")
    with pytest.raises(BadInput, match=r"tokenizer\.model is no SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_beyond_the_models_rows_is_refused(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 384}')
    check_vocabulary(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 383}')
    with pytest.raises(BadInput, match=r"has 384 ids, but the model has 383 rows"):
        check_vocabulary(tmp_path / "model")
