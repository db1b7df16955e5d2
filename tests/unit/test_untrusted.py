"""Pickles in a checkpoint: descriptions of numbers load, code does not run. `test_torch_dist.py` has the index."""

from __future__ import annotations

import enum
import io
import os
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_octo.errors import BadInput
from megatron_octo.model.untrusted import IN_RECORD, TENSOR_LOADERS, check_record, weights_only
from megatron_octo.model.weights import put_weights

RECIPES = "transformer_engine.common.recipe"


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def record(value: object) -> torch.Tensor:
    """A layer's record as Transformer Engine writes it."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A delayed-scaling recipe of a stand-in for Transformer Engine, which cannot be imported without a GPU."""

    class Format(enum.Enum):
        HYBRID = (448.0, 57344.0)

    @dataclass
    class DelayedScaling:
        fp8_format: Format = Format.HYBRID
        amax_history_len: int = 16

    module = types.ModuleType(RECIPES)
    for each in (Format, DelayedScaling):
        each.__module__, each.__qualname__ = RECIPES, each.__name__
        setattr(module, each.__name__, each)
    for name in ("transformer_engine", "transformer_engine.common", RECIPES):
        monkeypatch.setitem(sys.modules, name, module)
    return DelayedScaling()


@pytest.fixture(params=sorted(TENSOR_LOADERS), ids=lambda pair: pair[0])
def loader(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function under the name that pickled tensors refer to, which runs what it is given."""

    def load(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), weights_only=False)

    load.__module__, load.__qualname__ = request.param
    monkeypatch.setattr(".".join(request.param), load)
    monkeypatch.setattr(torch.storage, "_load_from_bytes", load)
    return load


def test_a_record_of_scales_and_their_recipe_passes(loader, recipe):
    scales = {"recipe": recipe, "scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1, "a": (1, [2.0])}}
    check_record("key", record(scales))
    check_record("key", torch.empty(0, dtype=torch.uint8))  # no FP8
    check_record("key", None)


def test_code_in_a_record_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    with pytest.raises(BadInput, match=r"the record layer\._extra_state refers to .*mkdir"):
        check_record("layer._extra_state", record({"recipe": Payload(mark)}))
    assert not mark.exists()


def test_code_inside_of_a_records_tensor_is_refused_and_does_not_run(tmp_path, loader):
    mark, blob = tmp_path / "ran", io.BytesIO()
    torch.save(Payload(mark), blob)

    class Storage:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return loader, (blob.getvalue(),)

    with pytest.raises(pickle.UnpicklingError):
        check_record("key", record(Storage()))
    assert not mark.exists()
    pickle.loads(record(Storage()).numpy().tobytes())
    assert mark.exists(), "the payload is one: plain pickle runs it"


def test_a_list_names_no_function_that_does_more_than_make_numbers():
    assert {name for module, name in IN_RECORD if module != RECIPES} == {
        "OrderedDict",
        "TEDelayedScaling",
        "_rebuild_tensor_v2",
        "_load_from_bytes",
        "safe_load_from_bytes",
    }


def test_records_are_checked_before_a_layer_gets_them(tmp_path):
    class Chunk:
        def load_state_dict(self, state: Any, strict: bool) -> None:
            raise AssertionError("the layers got it")

    loaded = {"model0": {"layer._extra_state": record(Payload(tmp_path / "ran"))}}
    with pytest.raises(BadInput, match=r"layer\._extra_state"):
        put_weights([Chunk()], loaded)


def test_transformer_engine_may_unpickle_records_that_were_checked_and_no_others(monkeypatch):
    allowed, seen = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", []
    monkeypatch.delenv(allowed, raising=False)

    class Chunk(torch.nn.Module):
        def load_state_dict(self, state: Any, strict: bool) -> Any:
            seen.append(os.environ.get(allowed))
            return types.SimpleNamespace(unexpected_keys=[], missing_keys=[])

    put_weights([Chunk()], {"model0": {"layer._extra_state": torch.empty(0, dtype=torch.uint8)}})
    assert seen == ["1"]  # Transformer Engine 2.20 refuses its own scales without it
    assert allowed not in os.environ


def test_torch_load_is_kept_to_weights_whatever_its_caller_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, path = tmp_path / "ran", tmp_path / "file.pt"
    torch.save({"a": Payload(mark)}, path)
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert not mark.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.load(path, weights_only=False)
    assert mark.exists()
