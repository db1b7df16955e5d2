"""What others make of the files that the data stages write: megatron-core's data sets, transformers' tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_octo.cli.preprocess import main
from megatron_octo.config.data import PrepareInput, SyntheticConfig, TokenizerConfig
from megatron_octo.data.indexed import IndexedWriter, token_type
from megatron_octo.data.read import read_records
from megatron_octo.data.synthetic import generate
from megatron_octo.data.templates import renderer
from megatron_octo.data.tokenizer import TRAPS, load_tokenizer
from megatron_octo.data.tokenizer_training import train_tokenizer

DOCUMENTS = [[5, 6, 7], [], [1], list(range(300)), [9] * 4000, [0, 0]]


@pytest.mark.parametrize("vocab_size", [384, 65_499, 65_500, 128_256])
def test_shards_are_byte_for_byte_megatrons_own(tmp_path, vocab_size):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    documents = [*DOCUMENTS, [vocab_size - 1]]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    with IndexedWriter(tmp_path / "ours", token_type(vocab_size)) as writer:
        for ids in documents:
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
            writer.add(ids)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    assert [ids.tolist() for ids in IndexedDataset(str(tmp_path / "ours"))] == [ids for ids in documents if ids]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 320 pieces beside the corpus of long answers that it learnt from."""
    home = tmp_path_factory.mktemp("data")
    generate(SyntheticConfig(output=home / "corpora", documents=(("long", 500),)))
    inputs = (PrepareInput(input=home / "corpora" / "long.jsonl", template="long_cot"),)
    train_tokenizer(TokenizerConfig(inputs=inputs, output=home / "tokenizer", vocab_size=320))
    return home / "tokenizer"


def write_as_megatron(prefix: Path, tokenizer: Path, library: str, texts: list[str], *, append_eod: bool) -> None:
    """What Megatron-LM's tools/preprocess_data.py does with its tokenizer and its builder."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.core.tokenizers import MegatronTokenizer

    theirs = MegatronTokenizer.from_pretrained(str(tokenizer), {"library": library})
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(theirs.vocab_size))
    for text in texts:
        ids = theirs.tokenize(text)
        if ids and append_eod:
            ids.append(theirs.eod)
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


def with_bos(folder: Path) -> Path:
    """The folder, its post-processor changed so that it begins texts as Llama 3's does."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "HuggingFaceTokenizer with BOS", "SentencePieceTokenizer"])
def test_preprocess_data_writes_what_megatrons_own_tokenizer_and_builder_write(
    kind, append_eod, tokenizer_folder, tmp_path
):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    library, model = "huggingface", with_bos(folder) if kind.endswith("BOS") else folder
    if kind == "SentencePieceTokenizer":
        library, model = "sentencepiece", folder / "tokenizer.model"
    corpus = tokenizer_folder.with_name("corpora") / "long.jsonl"
    texts = [*TRAPS, *(renderer("long_cot")(row).text for row in read_records(corpus)), ""]

    def same(texts: list[str]) -> bool:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({"a.b": text}) + "\n" for text in texts))
        options = ["--input", tmp_path / "in.jsonl", "--json-keys", "a.b", "--output-prefix", tmp_path / "ours"]
        options += ["--tokenizer-type", kind.split()[0], "--tokenizer-model", model, "--workers", 1]
        assert main([*map(str, options), *["--append-eod"] * append_eod]) == 0
        write_as_megatron(tmp_path / "theirs", model, library, texts, append_eod=append_eod)
        pairs = [(tmp_path / f"ours_a.b_document.{end}", tmp_path / f"theirs.{end}") for end in ("bin", "idx")]
        return all(ours.read_bytes() == theirs.read_bytes() for ours, theirs in pairs)

    assert same(texts)
    assert same(["a </s> b"]) == (library == "sentencepiece")  # the difference on purpose: Megatron forges the id


@pytest.mark.parametrize("in_a_model_folder", [False, True])
def test_transformers_loads_the_folder_and_encodes_the_same(tokenizer_folder, tmp_path, in_a_model_folder):
    from transformers import AutoTokenizer

    folder = shutil.copytree(tokenizer_folder, tmp_path / "model")
    if in_a_model_folder:  # transformers has its own ideas about the tokenizers of Llama models
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(tokenizer_folder)
    corpus = tokenizer_folder.with_name("corpora") / "long.jsonl"
    texts = [renderer("long_cot")(row).text for row in read_records(corpus)] + ["  a  b\n\n", "caf\u00e9 \U0001f600"]
    ids = ours.encode_batch(texts)
    assert theirs(texts)["input_ids"] == ids
    assert theirs.batch_decode(ids, skip_special_tokens=True) == texts
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 3, 320)
    theirs.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(texts)["input_ids"] == ids
