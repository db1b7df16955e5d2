"""Saves of a GPU: a run goes on from one to the same bits, in BF16 and in FP8, and a CPU reads the same weights.

Stages and helpers are `test_train.py`'s.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo.config.schedule import ConstantRate
from megatron_octo.config.train import FromRun, MidTrainConfig, PrecisionConfig
from megatron_octo.convert.torch_dist import Reader
from megatron_octo.platform import fp8, resolve
from tests.cpu.matrix import interrupt
from tests.gpu.test_train import BF16, SAVED, STEPS, folder, losses, octo_train, pytestmark, small  # noqa: F401

torch = pytest.importorskip("torch", reason="torch is not installed: make setup")

PRECISIONS = {
    "exact-bf16": BF16,
    "exact-delayed": PrecisionConfig(dtype="bf16", fp8="delayed"),
    "exact-weights": PrecisionConfig(dtype="bf16", fp8="tensorwise", fp8_weights=True),
}
NO_RATE = ConstantRate(peak=1e-12)


@pytest.fixture(autouse=True)
def runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811 - the fixture
    monkeypatch.setenv("OCTO_RUNS", str(folder / "runs"))


def exact(folder: Path, name: str, precision: PrecisionConfig) -> MidTrainConfig:  # noqa: F811 - the fixture
    """A stage from `base`, saved half-way."""
    return replace(small(folder, name, steps=STEPS), start=FromRun(run="base", optimizer=False), precision=precision)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_run_goes_on_from_its_save_to_the_same_bits(name: str, folder: Path) -> None:  # noqa: F811 - the fixture
    precision = PRECISIONS[name]
    if precision.fp8 != "off" and (missing := fp8.lacking(precision.fp8, resolve())):
        pytest.skip(f"{precision.fp8} needs {missing}")
    whole = octo_train(folder, exact(folder, name, precision))
    interrupt(name, f"{name}-resumed", after=SAVED)
    assert losses(octo_train(folder, exact(folder, f"{name}-resumed", precision))) == losses(whole)


def test_cpu_and_gpu_read_the_same_weights_of_each_others_saves(folder: Path) -> None:  # noqa: F811 - the fixture
    for name, run, on_cpu in (("to-gpu", "base", False), ("to-cpu", "to-gpu", True)):
        start = FromRun(run=run, optimizer=False, rate_jump=True)
        config = replace(small(folder, name, steps=1), start=start, learning_rate=NO_RATE)
        octo_train(folder, config if on_cpu else replace(config, precision=BF16), cpu=on_cpu)
    base, gpu, cpu = (
        Reader(folder / "runs" / run / "checkpoints/step_00000001") for run in ("base", "to-gpu", "to-cpu")
    )
    weights = [key for key in gpu.keys() if key.startswith(("embedding.", "decoder."))]  # noqa: SIM118 - no dict
    assert weights
    for key in weights:
        assert gpu.dtype(key) == torch.bfloat16
        assert torch.equal(gpu.read(key), base.read(key).bfloat16()), key
        assert torch.equal(cpu.read(key).bfloat16(), gpu.read(key)), key
