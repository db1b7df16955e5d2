"""In place of RL: Ray as RL starts it, and clients that try to enter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CLIENT = "import ray, sys; ray.init(address=sys.argv[1], logging_level='error'); print(ray.cluster_resources()['CPU'])"
CLIENT_TIMEOUT_S = 120


def say_who_may_enter() -> None:
    """Print who could connect: a client with this job's token, with another one, and without any."""
    import ray

    from megatron_octo.rl.engine import start_ray

    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    with tempfile.TemporaryDirectory(prefix="octo-ray-test-", dir="/tmp") as folder:
        start_ray(Path(folder), num_gpus=1, cuda=False)
        address = ray.get_runtime_context().gcs_address
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        entered = {
            "with": enters(address, dict(os.environ)),
            "wrong": enters(address, others | wrong),
            "without": enters(address, others),
        }
        ray.shutdown()
    print(json.dumps({"token": token.read_text(), "mode": oct(token.stat().st_mode & 0o777), **entered}), flush=True)


def enters(address: str, environment: dict[str, str]) -> bool:
    """Whether a client with that environment can connect."""
    argv = [sys.executable, "-c", CLIENT, address]
    client = subprocess.run(argv, env=environment, capture_output=True, timeout=CLIENT_TIMEOUT_S, check=False)
    return client.returncode == 0
