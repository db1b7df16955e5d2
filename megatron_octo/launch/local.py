"""Several ranks on this machine: torchrun around `octo train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_octo.errors import BadInput, OctoError
from megatron_octo.platform.process import run_launcher


def run_ranks(command: Sequence[str], num_ranks: int) -> None:
    """Run `octo COMMAND...` as `num_ranks` processes of one group on this machine, to their end.

    torchrun picks a free port, ends all ranks when one fails, and is ended with them when this process is. The ranks'
    output is this process's; SIGTERM and SIGUSR1 to this process are for them.

    Raises:
        BadInput: a rank refused its input, by its exit code; its own message is above.
        OctoError: a rank failed otherwise.
        KeyboardInterrupt: interrupted; the ranks have ended.
    """
    argv = [
        sys.executable,
        "-m",
        "megatron_octo.launch.ranks",
        "--standalone",
        f"--nproc-per-node={num_ranks}",
        "-m",
        "megatron_octo",
        *command,
    ]
    env = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning"),  # torchrun's own, of pynvml's name
    }
    code = run_launcher(argv, env=env)
    if code != 0:
        kind = BadInput if code == BadInput.exit_code else OctoError
        raise kind(
            f"{num_ranks} ranks of `octo {' '.join(command)}` ended with exit code {code}",
            fix="the first rank's message above says why; running it again goes on from the last save",
        )
