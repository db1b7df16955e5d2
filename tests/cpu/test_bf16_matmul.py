"""Products of bf16 matrices by way of fp32, in a process of their own: a change of torch's operators stays."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make setup")

PRODUCTS = """
import json, sys, torch
from megatron_octo.platform import bf16_matmul

def products(dtype):
    torch.manual_seed(0)
    left, right, bias = (torch.randn(size).to(dtype).requires_grad_() for size in ((5, 64), (64, 3), (3,)))
    results = [left @ right, torch.addmm(bias, left, right), 2 * torch.addmm(bias, left, right, beta=3, alpha=2)]
    sum(each.sum() for each in results).backward()
    return [*results, left.grad, right.grad, bias.grad]

before = {dtype: products(dtype) for dtype in (torch.float32, torch.bfloat16)}
supported = sys.argv[1] == "supported"
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: supported
changed = bf16_matmul.install() is not None
assert bf16_matmul.install() is bf16_matmul.install()
after = {dtype: products(dtype) for dtype in before}
print(json.dumps({
    "changed": changed,
    "fp32_same": all(torch.equal(a, b) for a, b in zip(before[torch.float32], after[torch.float32])),
    "dtypes": sorted({str(each.dtype) for each in after[torch.bfloat16]}),
    "difference": max(((a - b).abs().max() / a.abs().max()).item()
                      for a, b in zip(before[torch.bfloat16], after[torch.bfloat16])),
}))
"""


def products(support: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRODUCTS, support], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_a_cpu_without_bf16_multiplies_by_way_of_fp32_to_the_same_values_and_gradients() -> None:
    result = products("not supported")
    assert result["changed"]
    assert result["fp32_same"]
    assert result["dtypes"] == ["torch.bfloat16"]
    assert result["difference"] < 2**-7, "of the largest value: a bf16 number's own rounding"


def test_a_cpu_with_bf16_is_left_alone() -> None:
    assert products("supported") == {"changed": False, "fp32_same": True, "dtypes": ["torch.bfloat16"], "difference": 0}
