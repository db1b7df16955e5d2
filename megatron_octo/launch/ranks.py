"""torchrun that ends as its ranks do: `python -m megatron_octo.launch.ranks TORCHRUN_ARGUMENTS`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_octo.errors import BadInput


def main(argv: Sequence[str]) -> int:
    """Start the ranks and wait; 0, or bad input's exit code where a rank's is that, or 1."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(argv))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return BadInput.exit_code if BadInput.exit_code in codes else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
