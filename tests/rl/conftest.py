"""A small model folder and prompts for RL."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import struct
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.config.rl import RLConfig

NUM_BOXES = 30


def write_tokenizer(folder: Path) -> None:
    r"""A byte-level tokenizer: 256 bytes, </s>, <pad>, then boxed answers as single tokens. It gives every text back.

    The boxes say 1 (`\boxed{1}`, `\boxed{01}`, ...) and 2, `NUM_BOXES` of each: random weights answer, and half of
    their answers are 1.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<pad>", special=True)])
    tokenizer.add_tokens([f"\\boxed{{{'0' * zeros}{value}}}" for value in (1, 2) for zeros in range(NUM_BOXES)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def weights(shape: tuple[int, ...]) -> bytes:
    """A safetensors file with one tensor of zeros in bf16."""
    end = 2 * math.prod(shape)
    header = json.dumps({"zeros": {"dtype": "BF16", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(end)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with the files that a model has; its weights are a thousand zeros."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "config.json").write_text(
        json.dumps({"max_position_embeddings": 128, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 384})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    (folder / "model.safetensors").write_bytes(weights(shape=(100, 10)))
    return folder


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> RLConfig:
    """Two steps of four prompts; the prompt file holds twenty."""
    return two_steps(tmp_path, model_folder)


def two_steps(tmp_path: Path, model_folder: Path) -> RLConfig:
    """Settings of such a run, and its prompts."""
    rows = [{"input": f"Question:\nFind {i}+1.\nAnswer:\n", "label": str(i + 1)} for i in range(20)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RLConfig(
        name="test-rl",
        model=model_folder,
        prompts=path,
        output=tmp_path / "rl",
        num_steps=2,
        prompts_per_step=4,
        samples_per_prompt=4,
        learning_rate=1e-3,
        max_prompt_tokens=64,
        max_response_tokens=16,
        max_tokens_per_gpu=1024,
        num_gpus=1,
        save_every_steps=1,
    )


@pytest.fixture
def replaced(config: RLConfig):  # type: ignore[no-untyped-def]
    """The settings with some fields changed."""
    return lambda **fields: replace(config, **fields)


@pytest.fixture
def openrlhf_agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """OpenRLHF's module that makes samples."""
    yield from _openrlhf_module(monkeypatch, "utils", "agent")


@pytest.fixture
def openrlhf_loss(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """OpenRLHF's module of losses."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    yield from _openrlhf_module(monkeypatch, "models", "loss")


def _openrlhf_module(monkeypatch: pytest.MonkeyPatch, folder: str, module: str) -> Iterator[Any]:
    """A module of OpenRLHF without its package, whose other modules would load DeepSpeed."""
    pytest.importorskip("openrlhf", reason="openrlhf is not installed")
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.origin is not None
    package: Any = types.ModuleType(f"openrlhf.{folder}")
    package.__path__ = [str(Path(spec.origin).parent / folder)]
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield importlib.import_module(f"{package.__name__}.{module}")
    for name in set(sys.modules) - before:
        if name.startswith("openrlhf"):
            del sys.modules[name]
