"""The CPU patches of OpenRLHF, and two faults. Run by Python in each process of a cluster that `planted.py` starts."""

import os
import sys
import zlib
from pathlib import Path
from typing import Any

sys.path.append(os.environ["OCTO_TEST_PATCHES"])
import openrlhf_cpu_patches as patches  # type: ignore[import-not-found]

HEALED = Path(os.environ["OCTO_TEST_HEALED"])


def stale_weights(module: Any) -> None:
    """vLLM takes the weights sent and keeps its own, until HEALED is there."""
    patches._receive_weight(module)
    update = module.WorkerWrap.update_weight

    def update_weight(self: Any, name: str, dtype: Any, shape: Any, empty_cache: bool = False) -> None:
        model = self.model_runner.model
        if not HEALED.exists():
            self.model_runner.model = type("Deaf", (), {"load_weights": staticmethod(lambda weights: None)})
        try:
            update(self, name, dtype, shape, empty_cache)
        finally:
            self.model_runner.model = model

    module.WorkerWrap.update_weight = update_weight


def raising_reward(module: Any) -> None:
    """Grading raises on about one response of four."""
    grade = module.grade

    def raising(response: str, reference: str) -> Any:
        if zlib.crc32(response.encode()) % 4 == 0:
            raise RuntimeError("planted")
        return grade(response, reference)

    module.grade = raising


patches.AFTER |= {"openrlhf.trainer.ray.vllm_worker_wrap": stale_weights, "megatron_octo.grading": raising_reward}
patches.install()
