"""What a machine has, told by its files."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from megatron_octo import platform


@pytest.mark.parametrize("place", ["transformer_engine/wheel_lib", "transformer_engine", "."])
def test_transformer_engine_is_there_with_its_torch_part_wherever_an_installation_put_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformer_engine/wheel_lib").mkdir(parents=True)
    (tmp_path / "transformer_engine/__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)  # None once a CPU was prepared
    assert not platform.has_engine()
    (tmp_path / place / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so").touch()
    assert platform.has_engine()


def test_random_states_of_another_kind_of_device_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    platform.resolve().activate()
    from megatron.core import tensor_parallel

    from megatron_octo.train.checkpoint import _set_random_states

    tracker = tensor_parallel.get_cuda_rng_tracker()
    before, names = torch.get_rng_state(), set(tracker.get_states())
    torch.rand(1)
    with caplog.at_level(logging.WARNING, logger="megatron_octo"):
        gpus = torch.zeros(16, dtype=torch.uint8)  # the state of a GPU's generator is a seed and an offset
        _set_random_states({"cpu": before, "device": gpus, "tracker": {"model-parallel-rng": gpus}})
    assert "another kind of device" in caplog.text
    assert set(tracker.get_states()) == names
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("chosen", "then"), [(None, "0"), ("1", "1")])
def test_attention_sums_in_one_order_unless_the_user_chose(
    chosen: str | None, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
    monkeypatch.setenv(name, chosen or "")  # for its end
    if chosen is None:
        monkeypatch.delenv(name)
    gpu = platform.Platform(device="cuda", backend="nccl", layer_family="transformer_engine")
    gpu.fix_order()
    assert os.environ[name] == then
