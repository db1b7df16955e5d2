"""`python -m megatron_octo.rl.engine`: holds or joins a Ray cluster, runs OpenRLHF's entry point once a line of input.

Started by `rl/cluster.py` alone. Says that Ray runs, then reads lists of arguments as JSON lines; answers "finished",
or what failed, on a pipe of its own. Ends when its input does, or at SIGTERM, and dies with its parent.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_octo.errors import BadInput, OctoError
from megatron_octo.platform.deepspeed_kernels import compile_cpu_kernels
from megatron_octo.platform.process import die_with
from megatron_octo.rl.cluster import READY, Message
from megatron_octo.rl.command import environment

ENTRY = "openrlhf.cli.train_ppo_ray"
OBJECT_STORE_BYTES_CPU = 512 * 1024**2
RELEASE_TIMEOUT_S = 30
NODES_TIMEOUT_S = 300.0
ACCELERATOR = "accelerator_type:"  # begins the name of a resource of Ray's, as in accelerator_type:H100


def main(
    *, address: str | None, folder: str, num_nodes: int, num_gpus: int, cuda: bool, status: int, parent: int
) -> None:
    """Serve runs until the input ends."""

    def begin() -> None:
        if address:
            join_ray(address, num_nodes=num_nodes, num_gpus=num_gpus, cuda=cuda)
        else:
            start_ray(Path(folder), num_gpus=num_gpus, cuda=cuda)
        signal.signal(signal.SIGTERM, _end)  # Ray has put a handler of its own in its place

    def say(message: Message) -> None:
        os.write(status, json.dumps(message).encode() + b"\n")

    die_with(parent, signal.SIGKILL)
    signal.signal(signal.SIGTERM, _end)
    preload = threading.Thread(target=_preload, args=(cuda,), daemon=True)  # meanwhile Ray's processes start
    preload.start()
    began = _outcome(begin, READY)
    say(began)
    if began != READY:
        _end(signal.SIGTERM, None)  # which is on its way, if it is not what broke this off
    preload.join()
    for line in sys.stdin:
        sys.argv = [ENTRY, *json.loads(line)]
        message = _outcome(lambda: runpy.run_module(ENTRY, run_name="__main__"), "finished")
        if address:
            _leave_ray()  # which frees what this run held, and touches nobody else's
            begin()
        else:
            release()
        say(message)


def _outcome(act: Callable[[], object], done: str) -> Message:
    """`done`, or how `act` failed: what and fix of bad input.

    Where SIGTERM broke it off, nobody waits for an answer: this process ends.
    """
    try:
        act()
    except BadInput as refused:
        return {"what": refused.what, "fix": refused.fix}
    except (Exception, SystemExit) as error:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # Ray makes another SystemExit of the one in `_end`
            sys.exit(0)
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return done


def _end(number: int, _: object) -> NoReturn:
    """End by Ray's own ending, which runs at exit. A second signal is not to break that off, and finds no handler."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def start_ray(folder: Path, *, num_gpus: int, cuda: bool, host: str = "127.0.0.1") -> None:
    """Start a cluster, of this node for now; its processes are killed with this one."""
    import ray

    ray.init(
        address="local",
        **resources(num_gpus=num_gpus, cuda=cuda),
        include_dashboard=False,
        _node_ip_address=host,
        _temp_dir=str(folder),
        logging_level="warning",
    )


def resources(*, num_gpus: int, cuda: bool) -> dict[str, int]:
    """What a node of ours gives to Ray."""
    # each device holds one bundle of one CPU, and OpenRLHF's controller takes one
    shares = {"num_cpus": 2 * num_gpus + 1, "num_gpus": num_gpus}
    return shares if cuda else shares | {"object_store_memory": OBJECT_STORE_BYTES_CPU}


def join_ray(address: str, *, num_nodes: int, num_gpus: int, cuda: bool) -> None:
    """Connect to a cluster, and wait until it has `num_nodes` nodes of `num_gpus` devices.

    Raises:
        OctoError: it has not, for long.
        BadInput: its devices are GPUs, and this machine, by which the run was set up, has none.
    """
    import ray

    # Within `ray job submit` Ray refuses variables that the job's own environment has too, unless told whose win. Ours:
    # the job's are in this process's environment, so PATH and PYTHONPATH have what it put there, behind ours.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    # its nodes may have been started with any other environment
    variables = {name: os.environ[name] for name in environment({}, cuda=cuda)}
    ray.init(address=address, runtime_env={"env_vars": variables}, logging_level="warning")
    deadline = time.monotonic() + NODES_TIMEOUT_S
    while len(there := [node for node in ray.nodes() if _devices(node) >= num_gpus]) < num_nodes:
        if time.monotonic() > deadline:
            raise OctoError(
                f"{len(there)} of {num_nodes} nodes with {num_gpus} devices are there after {NODES_TIMEOUT_S:g} s"
            )
        time.sleep(1)
    if not cuda:
        _refuse_gpus(there)


def _refuse_gpus(nodes: Sequence[dict[str, Any]]) -> None:
    """Refuse nodes of which one has real GPUs: Ray finds their type there, whatever number a node was told to offer."""
    names = (name for node in nodes for name in node["Resources"])
    kind = next((name.removeprefix(ACCELERATOR) for name in names if name.startswith(ACCELERATOR)), None)
    if kind is not None:
        # --entrypoint-num-gpus would keep a GPU from the run. A job that asks for resources and no GPU sees none.
        there = json.dumps({f"{ACCELERATOR}{kind}": 0.001})
        submit = f"ray job submit --entrypoint-resources '{there}' -- env -u CUDA_VISIBLE_DEVICES octo rl ..."
        raise BadInput(
            f"the nodes of the cluster have GPUs ({kind}), and this machine shows none: their run would be set up for "
            "CPUs",
            fix=f"start it on one of those nodes, by hand or by `{submit}`; see docs/rl.md",
        )


def _devices(node: dict[str, Any]) -> float:
    amount: float = node["Resources"].get("GPU", 0.0) if node["Alive"] else 0.0
    return amount


def _leave_ray() -> None:
    import ray

    ray.shutdown()


def _preload(cuda: bool) -> None:
    """Import what the entry point imports (its own code runs under `__main__` only), and have its kernels ready."""
    import openrlhf.cli.train_ppo_ray  # noqa: F401

    if not cuda:
        compile_cpu_kernels()


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
    main(**json.loads(sys.argv[1]))
