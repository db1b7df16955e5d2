"""What others make of the files that the data stages write: megatron-core's data sets, transformers' tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_octo.config.data import PrepareInput, SyntheticConfig, TokenizerConfig
from megatron_octo.data.indexed import IndexedWriter, token_type
from megatron_octo.data.read import read_records
from megatron_octo.data.synthetic import generate
from megatron_octo.data.templates import renderer
from megatron_octo.data.tokenizer import load_tokenizer
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
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
            writer.add(ids)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    assert [ids.tolist() for ids in IndexedDataset(str(tmp_path / "ours"))] == documents


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 320 pieces beside the corpus of long answers that it learnt from."""
    home = tmp_path_factory.mktemp("data")
    generate(SyntheticConfig(output=home / "corpora", documents=(("long", 500),)))
    inputs = (PrepareInput(input=home / "corpora" / "long.jsonl", template="long_cot"),)
    train_tokenizer(TokenizerConfig(inputs=inputs, output=home / "tokenizer", vocab_size=320))
    return home / "tokenizer"


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
