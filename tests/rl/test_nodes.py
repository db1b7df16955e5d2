"""RL on two nodes, which are two raylets of this machine with a logical device each; and who may enter a Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.rl import LongerResponses, RLConfig
from megatron_octo.rl.cluster import LOOPBACK, TOKEN, cluster, token_environment
from megatron_octo.rl.collect import read_metrics
from megatron_octo.rl.run import has_gpu
from megatron_octo.rl.watch import MOST_VLLM_KL_CPU
from tests.conftest import REPOSITORY
from tests.rl.test_openrlhf import LEARNING_RATE, write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(has_gpu(), reason="the tiny model is for machines without a GPU"),
]
CLIENT = "import ray, sys; ray.init(address=sys.argv[1], logging_level='error'); print(ray.cluster_resources()['CPU'])"
CLIENT_TIMEOUT_S = 120
RUN_TIMEOUT_S = 900


def enters(address: str, auth: Mapping[str, str]) -> bool:
    """Whether a client with that in its environment can connect."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | auth
    argv = [sys.executable, "-c", CLIENT, address]
    client = subprocess.run(argv, env=env, capture_output=True, timeout=CLIENT_TIMEOUT_S, check=False)
    return client.returncode == 0


def head_of(pid: int) -> str:
    """The address of the Ray whose processes descend from one."""
    words = (word for child in psutil.Process(pid).children(recursive=True) for word in child.cmdline())
    return next(word.partition("=")[2] for word in words if word.startswith("--gcs-address="))


def test_a_ray_of_ones_own_takes_no_client_without_its_token() -> None:
    with cluster(num_nodes=1, num_gpus=1, cuda=False) as engine:
        address = head_of(engine.process.pid)
        (folder,) = Path("/tmp").glob(f"octo-ray-{os.getpid()}-*")
        assert enters(address, LOOPBACK | token_environment(folder / TOKEN))
        assert not enters(address, LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
        assert not enters(address, LOOPBACK)
    assert not folder.exists()


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def start_node(rank: int, config: RLConfig, port: int) -> subprocess.Popen[str]:
    """Run a node's part in the way that a Slurm job does."""
    path = config.prompts.with_name("config.json")
    rundir.write_json(path, to_dict(config))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_PROCID": str(rank), "OMP_NUM_THREADS": "1"}
    own = ["--gpus", str(config.num_gpus), "--token", str(path.with_name(TOKEN))]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_octo", "slurm", "node", *own, "--", "rl", str(path)],
        cwd=REPOSITORY,
        env={**os.environ, **place},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_two_nodes(config: RLConfig, num_steps: int) -> RLConfig:
    """`config` on two nodes of a device each, with a model and answers of which it finds about half."""
    write_model(config.model)
    rows = [json.loads(line) for line in config.prompts.read_text().splitlines()]
    config.prompts.write_text("".join(json.dumps({**row, "label": "1"}) + "\n" for row in rows))
    return replace(config, num_nodes=2, num_steps=num_steps, learning_rate=LEARNING_RATE, stop=("1}", "2}"))


def test_two_nodes_train_one_model_and_each_one_s_vllm_has_its_weights(config: RLConfig) -> None:
    longer = (LongerResponses(after_step=2, max_response_tokens=20),)  # OpenRLHF is ended in between, Ray is not
    config = replace(on_two_nodes(config, num_steps=4), save_every_steps=2, longer_responses=longer)
    port = free_port()
    first, second = (start_node(rank, config, port) for rank in (0, 1))
    try:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while first.poll() is None and time.monotonic() < deadline:
            time.sleep(1)
        _, errors = first.communicate(timeout=30)
        assert first.returncode == 0, errors
        _, of_second = second.communicate(timeout=120)
        assert second.returncode == 0, of_second
    finally:
        for each in (first, second):
            each.terminate()
            each.wait(60)
    rows = read_metrics(config.output / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(abs(row["rl/vllm_kl"]) < MOST_VLLM_KL_CPU and row["optim/grad_norm"] > 0 for row in rows)
    assert rundir.is_done(config.output)
    # each rank has its part of the optimizer
    assert len(list((config.output / "openrlhf/_actor/global_step4").glob("*optim_states.pt"))) == 2
    assert not config.prompts.with_name(TOKEN).exists()
    assert not list(Path("/tmp").glob(f"octo-ray-{first.pid}-*")) + list(Path("/tmp").glob(f"octo-ray-{second.pid}-*"))
