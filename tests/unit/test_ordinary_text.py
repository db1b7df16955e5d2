"""Text that spells a control token is ordinary text, as tiktoken's `encode_ordinary` has it, in every engine."""

from __future__ import annotations

import base64
import json

import pytest
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
