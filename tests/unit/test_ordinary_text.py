"""Text that spells a control token is ordinary text, as tiktoken's `encode_ordinary` has it, in every engine."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_octo.data import tokenizer as module
from megatron_octo.data.tokenizer import LLAMA3_CONTROLS, LLAMA3_SPLIT, TRAPS, accelerated, load_tokenizer

CONTROLS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
PARTS = [*CONTROLS, "<|", "|>", "end_of_text", "the ", "answer", " 123456", "\n\n", "\u00e9", " \U0001f600", "I'll"]


@pytest.fixture(scope="module")
def ranks(texts) -> dict[bytes, int]:
    """A small byte-level vocabulary, learnt with Llama-3's way to split text: {bytes of a token: rank}."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([*texts[:2000], *PARTS * 3], trainer)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
    return {bytes(to_byte[char] for char in token): rank for token, rank in learner.get_vocab().items()}


@pytest.fixture(scope="module")
def oracle(ranks) -> tiktoken.Encoding:
    specials = {control: len(ranks) + at for at, control in enumerate(LLAMA3_CONTROLS)}
    return tiktoken.Encoding("small", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory):
    """The vocabulary as a tiktoken file."""
    path = tmp_path_factory.mktemp("llama3")
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered]
    (path / "tokenizer.model").write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def of_tiktoken(folder, ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LLAMA3_RANKS", len(ranks))
        return load_tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def of_json(folder, tmp_path_factory):
    """The same as a tokenizer.json, which registers its control tokens as special."""
    path = tmp_path_factory.mktemp("json")
    (path / "tokenizer.json").write_text(module._llama3(folder / "tokenizer.model").to_str())
    config = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(path)


def test_llama3s_file_has_its_control_ids_after_its_ranks(of_tiktoken, of_json, ranks):
    for each in (of_tiktoken, of_json):
        assert (each.bos_id, each.eos_id) == (len(ranks), len(ranks) + 1)
        assert each.vocab_size == len(ranks) + 256
        assert each.controls == LLAMA3_CONTROLS


def test_gigatoken_takes_both_forms(of_tiktoken, of_json, texts):
    for each in (of_tiktoken, of_json):
        assert accelerated(each, texts[:200]).engine == "gigatoken"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PARTS), max_size=12).map("".join)))
@example("".join(CONTROLS))
@example("\n".join(TRAPS))
def test_every_engine_gives_tiktokens_ordinary_ids(of_tiktoken, of_json, oracle, text):
    expected = oracle.encode_ordinary(text)
    for each in (of_tiktoken, of_json):
        assert each.encode(text) == expected
        fast = module._gigatoken(each.fast())
        assert fast([text, text]).ids.tolist() == expected * 2


def test_hugging_faces_own_way_forges_control_ids(of_json, folder, ranks):
    """What this guards against: without the guard the same text ends a document."""
    forged = module._llama3(folder / "tokenizer.model").encode("a <|end_of_text|> b").ids
    assert of_json.eos_id in forged
    assert of_json.eos_id not in of_json.encode("a <|end_of_text|> b")


SPELT = "<s>ab</s> a<|im_end|><unk> b<think>"
ORDINARY = "ab a <think> 7 </think> s>ab <|im_end> <b"


def of_pieces(folder: Path, kind: str) -> Path:
    """A SentencePiece model with a control token, a thought and a digit among its user-defined pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab a b </ s> is im_end think unk | < > / _ 7"] * 50),
        model_writer=model,
        model_type=kind,
        vocab_size=44,
        hard_vocab_limit=False,
        user_defined_symbols=["<|im_end|>", "<think>", "7"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def of_model(folder: Path, kind: str) -> Path:
    """A tokenizer.json whose model knows its control tokens as words; only some of them are special added tokens."""
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "<think>", *sorted(set(SPELT + ORDINARY))]
    ids = {token: index for index, token in enumerate(tokens)}
    models = tokenizers.models
    made = {
        "unigram": lambda: models.Unigram([(token, -float(len(token) == 1)) for token in ids], unk_id=0),
        "words": lambda: models.WordLevel(ids, unk_token="<unk>"),
        "bpe": lambda: models.BPE(
            {**ids, "</": len(ids), "s>": len(ids) + 1}, [("<", "/"), ("s", ">"), ("</", "s>")], unk_token="<unk>"
        ),
        "bpe of whole words": lambda: models.BPE(ids, [], unk_token="<unk>", ignore_merges=True),
    }
    out = tokenizers.Tokenizer(made[kind]())
    if "words" in kind:
        out.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<[^>]*>| "), "isolated")
    out.add_special_tokens(["<unk>", "<s>"])
    out.add_tokens([tokenizers.AddedToken("</s>", special=False), tokenizers.AddedToken("<think>", special=False)])
    out.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = [(of_pieces, kind) for kind in ("bpe", "unigram")]
KINDS += [(of_model, kind) for kind in ("unigram", "bpe", "bpe of whole words")]


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_no_kind_of_tokenizer_makes_a_control_token_of_text_or_an_id_less_of_other_text(make, kind, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path, kind))
    assert sorted(tokenizer.controls) == ["</s>", "<s>", "<unk>", "<|im_end|>"]
    ids = tokenizer.encode(SPELT)
    assert [tokenizer.decode([index]) for index in ids if index < 5] == ["<think>"]  # 0 to 4 are the named tokens
    assert tokenizer.decode(ids).replace(" ", "") == SPELT.replace(" ", "")
    library = tokenizers.Tokenizer.from_file if make is of_model else sentencepiece.SentencePieceProcessor
    given = library(str(next(tmp_path.glob("tokenizer.[jm]*"))))
    expected = given.encode(ORDINARY)
    assert tokenizer.encode(ORDINARY) == (expected.ids if make is of_model else expected)


def test_a_tokenizer_of_words_takes_a_control_token_for_an_unknown_word(tmp_path):
    tokenizer = load_tokenizer(of_model(tmp_path, "words"))
    assert tokenizer.decode(tokenizer.encode("a </s> b")) == "a   <unk>   b"
