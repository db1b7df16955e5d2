"""Conversion needs nothing of the machines that train, and runs no code that a checkpoint brings along."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert.from_hf import from_hf
from megatron_octo.convert.random_base import random_base
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.errors import BadInput
from tests.conftest import REPOSITORY, word_tokenizer

GUARD = """
import builtins, sys
from pathlib import Path

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformer_engine", "apex", "megatron"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Guard())
import torch, torch.distributed

def forbidden(*args, **kwargs):
    raise AssertionError("a device or a rank was asked for")

torch.cuda._lazy_init = torch.cuda.init = torch.distributed.init_process_group = forbidden
from megatron_octo.convert.from_hf import from_hf
from megatron_octo.convert.to_hf import to_hf

work = Path(sys.argv[1])
from_hf(work / "base", work / "import", logits=False)
to_hf(work / "import", work / "export", work / "words", dtype="fp32", logits=False)
"""


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a tokenizer and a random model."""
    model = ModelConfig(
        hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24, vocab_size=32, tied_embeddings=False
    )
    random_base(RandomBaseConfig(model=model, tokenizer=word_tokenizer(tmp_path / "words"), output=tmp_path / "base"))
    return tmp_path


def test_both_ways_without_transformer_engine_apex_megatron_gpu_or_ranks(work: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GUARD, str(work)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("base", "export")
    first, second = ((work / name / "model.safetensors").read_bytes() for name in names)
    assert first == second


def pickled(value: Any) -> bytes:
    """As torch.save writes an object."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


@pytest.mark.parametrize("place", ["common.pt", "blob", "_extra_state", "rng_state", "tensor", ".metadata"])
def test_code_planted_in_a_checkpoint_does_not_run_when_it_is_converted(work: Path, place: str) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    save, mark = from_hf(work / "base", work / "import", verify=False), work / "ran"
    index = pickle.loads((save / ".metadata").read_bytes())
    norm = next(each for each in index.storage_data if each.fqn == "decoder.final_layernorm.weight")
    (save / "planted").write_bytes(pickled(Payload(mark)))
    length = (save / "planted").stat().st_size
    if place == "common.pt":
        (save / place).write_bytes(pickled(Payload(mark)))
    elif place == ".metadata":
        index.planner_data = Payload(mark)
    elif place == "tensor":
        stored = index.storage_data[norm]
        stored.relative_path, stored.offset, stored.length = "planted", 0, length
    else:
        key = f"decoder.layers.mlp.linear_fc1.{place}/shard_0_2" if place == "_extra_state" else f"{place}/shard_0_1"
        where = MetadataIndex(key)
        index.state_dict_metadata[key] = BytesStorageMetadata()
        index.storage_data[where] = type(index.storage_data[norm])("planted", 0, length)
    (save / ".metadata").write_bytes(pickle.dumps(index))
    if place in ("tensor", ".metadata"):
        with pytest.raises(BadInput):
            to_hf(save, work / "export", work / "words", logits=False)
        assert not (work / "export").exists()
    else:
        to_hf(save, work / "export", work / "words", logits=False)
    assert not mark.exists()
    torch.load(save / "planted", weights_only=False)
    assert mark.exists(), "the payload is one: plain torch.load runs it"
