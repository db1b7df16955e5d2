"""`python -m tests.rl.planted CONFIG HEALED`: `octo rl CONFIG` with faults planted in OpenRLHF's processes.

`planted_faults/sitecustomize.py` says which; old weights are cured once the file HEALED is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_octo.cli.app import main
from megatron_octo.rl import command

if __name__ == "__main__":
    _, config, healed = sys.argv
    os.environ |= {"OCTO_TEST_PATCHES": str(command.CPU_PATCHES), "OCTO_TEST_HEALED": healed}
    command.CPU_PATCHES = Path(__file__).with_name("planted_faults")
    sys.exit(main(["rl", config]))
