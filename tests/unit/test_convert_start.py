"""How an export starts: its input is read before torch is loaded, a plain tokenizer without most of transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_octo import rundir
from megatron_octo.convert.hf_folder import load_tokenizer
from megatron_octo.errors import BadInput
from tests.conftest import REPOSITORY

SLOW = (
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.candidate_generator",
    "sklearn",
    "pandas",
)
STARTS = """
import sys
from pathlib import Path
from megatron_octo.cli import app
from megatron_octo.convert import to_hf
from megatron_octo.convert.sums import Sums

class Noted(Sums):
    def __init__(self, files):
        print("torch" in sys.modules)
        super().__init__(files)

to_hf.Sums = Noted
made, words, out, *slow = sys.argv[1:]
assert app.main(["convert", "to-hf", f"{made}/import", out, "--tokenizer", words, "--skip-logits"]) == 0
print([name for name in slow if name in sys.modules])
"""


def test_an_export_hashes_its_input_before_torch_loads_and_never_loads_what_only_models_need(
    made: Path, words: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", STARTS, made, words, tmp_path / "out", *SLOW]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["False", str(tmp_path / "out"), "[]"], done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", None])
@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"20": {"content": "<more>"}}},
        {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
        {},
    ],
    ids=("fast", "backend", "llama", "qwen2", "gpt2", "added", "own-code", "unnamed"),
)
def test_a_tokenizer_is_the_one_that_transformers_chooses(
    words: Path, tmp_path: Path, settings: dict[str, Any], kind: str | None
) -> None:
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(words, tmp_path / "words"))
    controls = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    rundir.write_json(folder / "tokenizer_config.json", {**controls, **settings})
    if kind is not None:
        rundir.write_json(folder / "config.json", {"model_type": kind})
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        with pytest.raises(BadInput, match="cannot be loaded"):
            load_tokenizer(folder)
        return
    ours = load_tokenizer(folder)
    assert type(ours) is type(theirs) and len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in ("a b c", "<s> a </s>", "q"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
