"""`tools/preprocess_data.py` by Megatron's flags: what is not Megatron's is said or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from megatron_octo.cli.preprocess import main
from megatron_octo.data.indexed import read_documents

Run = Callable[..., tuple[int, str]]
WORDS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "a", "b", "[UNK]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tokenizer of a chat model of Llama 3's kind, of words."""
    out = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    out.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    out.add_special_tokens(WORDS[:3])
    out.post_processor = tokenizers.processors.TemplateProcessing(f"{WORDS[0]} $A", special_tokens=[(WORDS[0], 0)])
    out.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": WORDS[0], "eos_token": WORDS[2]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the tool on a small file; return its exit code and what it says."""
    texts = ["a b", "b <|end_of_text|> a", "", " "]
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(*options: object) -> tuple[int, str]:
        given = ["--input", folder / "in.jsonl", "--output-prefix", folder / "out", "--tokenizer-model", folder]
        code = main([*map(str, given), *map(str, options)])
        return code, capsys.readouterr().err

    return run


def test_documents_end_as_megatrons_with_what_the_folder_states_and_control_tokens_in_texts_are_counted(run, folder):
    code, said = run("--append-eod", "--partitions", 2, "--keep-sequential-samples", "--log-interval", 100)
    assert code == 0
    assert read_documents(folder / "out_text_document", 9) == [[0, 3, 4, 2], [0, 4, 5, 3, 2], [0, 2], [0, 2]]
    assert "out_text_document: control tokens that the texts spell are ordinary text here: 1 x <|end_of_text|>" in said
    assert "will differ" not in said


def test_without_the_post_processors_tokens_documents_are_bare(run, folder):
    assert run("--append-eod", "--tokenizer-hf-no-include-special-tokens")[0] == 0
    assert read_documents(folder / "out_text_document", 9) == [[3, 4, 2], [4, 5, 3, 2]]


def test_a_folder_that_transformers_reads_otherwise_is_named(run, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "BertTokenizer"}))
    said = run("--tokenizer-hf-no-include-special-tokens")[1]
    assert "Megatron's files will differ: transformers' BertTokenizer is not what" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--split-sentences"], "split them beforehand"),
        (["--vocab-file", "vocab.json"], "--vocab-file is not supported"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "save_pretrained"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "reads a tokenizer.model"),
        (["--partitions", "4"], "--keep-sequential-samples"),
        (["--append-eos"], "did you mean --append-eod"),
        (["--tokenizer-model", "nowhere"], "nowhere is none"),
    ],
)
def test_what_would_not_be_megatrons_is_refused(options, says, run, folder):
    before = sorted(folder.iterdir())
    code, said = run(*options)
    assert code == 2
    assert says in said
    assert sorted(folder.iterdir()) == before


def test_a_post_processor_that_ends_texts_too_is_refused(run, folder):
    out = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    out.post_processor = tokenizers.processors.TemplateProcessing("$A <|eot_id|>", special_tokens=[("<|eot_id|>", 2)])
    out.save(str(folder / "tokenizer.json"))
    code, said = run()
    assert code == 2
    assert "makes ['a', '<|eot_id|>'] of 'a'" in said
