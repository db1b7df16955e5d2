"""`python -m megatron_octo.rl.engine`: holds a Ray cluster, runs OpenRLHF's own entry point once a line of input.

Started by `rl/cluster.py` alone. Reads lists of arguments as JSON lines; answers "finished", or how the
run failed, on a pipe of its own. Ends when its input does, and dies with its parent.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from megatron_octo.platform.deepspeed_kernels import compile_cpu_kernels
from megatron_octo.platform.process import die_with

ENTRY = "openrlhf.cli.train_ppo_ray"
OBJECT_STORE_BYTES_CPU = 512 * 1024**2
RELEASE_TIMEOUT_S = 30


def main(folder: Path, num_gpus: int, cuda: bool, status: int, parent: int) -> None:
    """Serve runs until the input ends."""
    die_with(parent, signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Ray's own ending runs at exit
    preload = threading.Thread(target=_preload, args=(cuda,), daemon=True)  # meanwhile Ray's processes start
    preload.start()
    start_ray(folder, num_gpus=num_gpus, cuda=cuda)
    preload.join()
    for line in sys.stdin:
        message = _run(json.loads(line))
        release()
        os.write(status, json.dumps(message).encode() + b"\n")


def start_ray(folder: Path, *, num_gpus: int, cuda: bool) -> None:
    """Start this machine's own cluster; its processes are killed with this one."""
    import ray

    ray.init(
        address="local",
        # each device holds one bundle of one CPU, and OpenRLHF's controller takes one
        num_cpus=2 * num_gpus + 1,
        num_gpus=num_gpus,
        include_dashboard=False,
        object_store_memory=None if cuda else OBJECT_STORE_BYTES_CPU,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
        logging_level="warning",
    )


def _preload(cuda: bool) -> None:
    """Import what the entry point imports (its own code runs under `__main__` only), and have its kernels ready."""
    import openrlhf.cli.train_ppo_ray  # noqa: F401

    if not cuda:
        compile_cpu_kernels()


def _run(arguments: list[str]) -> str:
    sys.argv = [ENTRY, *arguments]
    try:
        runpy.run_module(ENTRY, run_name="__main__")
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "finished"


def release() -> None:
    """Give the devices back: OpenRLHF leaves its actors and placement groups to the end of the process."""
    import ray
    from ray.util.placement_group import placement_group_table

    gc.collect()  # actors end when their last handle goes
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while _devices_held(ray) and time.monotonic() < deadline:
        time.sleep(0.1)
    for identifier, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            ray.util.remove_placement_group(_group(identifier))


def _devices_held(ray: Any) -> bool:
    total, free = ray.cluster_resources(), ray.available_resources()
    return any(free.get(name, 0.0) < amount for name, amount in total.items() if name.startswith("GPU_group"))


def _group(identifier: str) -> Any:
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    return PlacementGroup(PlacementGroupID(bytes.fromhex(identifier)))


if __name__ == "__main__":
    _, _folder, _num_gpus, _cuda, _status, _parent = sys.argv
    main(Path(_folder), int(_num_gpus), bool(int(_cuda)), int(_status), int(_parent))
