"""Which tokens the logits of an export are compared at, and that random ones are told as such."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_octo.convert import sample

LETTERS = "abcdefghijklmnopq"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder whose tokenizer knows the letters a (id 2) to q, and begins a text with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: index for index, name in enumerate(["<s>", "<unk>", *LETTERS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(LETTERS))
    return path


def test_a_text_is_repeated_to_the_number_of_positions(folder: Path, text: Path) -> None:
    ids, told = sample.tokens(folder, text, vocab_size=19, rows=2, length=10)
    assert ids.flatten().tolist() == [*range(2, 19), 2, 3, 4] and ids.shape == (2, 10)
    assert told == "tokens of text.txt"


@pytest.mark.parametrize("wrong", ["empty text", "unknown words", "small model", "no tokenizer", "torn tokenizer"])
def test_where_no_text_can_be_made_the_tokens_are_random_and_told(folder: Path, text: Path, wrong: str) -> None:
    vocab_size = 18 if wrong == "small model" else 19
    if wrong == "empty text":
        text.write_text("")
    if wrong == "unknown words":
        text.write_text(sample.TEXT.read_text())
    if wrong == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if wrong == "torn tokenizer":
        (folder / "tokenizer.json").write_text("{")
    ids, told = sample.tokens(folder, text, vocab_size=vocab_size, rows=4, length=250)
    why = {"no tokenizer": "is missing", "torn tokenizer": "cannot be loaded"}
    assert told == f"random tokens, since the tokenizer {why.get(wrong, 'makes too little of text.txt')}"
    assert ids.shape == (4, 250) and set(ids.flatten().tolist()) == set(range(vocab_size))
    assert torch.equal(ids, sample.tokens(folder, text, vocab_size=vocab_size, rows=4, length=250)[0])


def test_the_text_of_the_package_is_english_with_mathematics() -> None:
    text = sample.TEXT.read_text()
    assert text.isascii() and len(text.split()) > 700
    assert all(each in text for each in ("\\boxed{180}", "$n^2 + (2n + 1) = (n + 1)^2$", "User: ", "def gcd"))
