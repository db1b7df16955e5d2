"""`octo doctor`: what is installed, what each stage can do here, the exact fix for what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from megatron_octo import console
from megatron_octo.cli.options import parser
from megatron_octo.platform.inventory import abilities, parts


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parser("doctor", "What is installed, what each stage can do here, how to get what is missing.")
    options.add_argument("--json", action="store_true", help="machine output")
    own = options.parse_args(argv)
    found = parts()
    stages = abilities(found)
    if own.json:
        console.emit_json({"parts": [asdict(part) for part in found], "stages": [asdict(stage) for stage in stages]})
        return
    console.table(
        "parts", ("part", "found", "used for"), [(part.name, part.found or "missing", part.use) for part in found]
    )
    console.table(
        "stages on this machine",
        ("stage", "runs", "how"),
        [(stage.stage, "yes" if stage.runs else "no", stage.how) for stage in stages],
    )
    missing = [part for part in found if not part.found]
    if missing:
        console.emit("how to get what is missing:\n" + "\n".join(f"  {part.name}: {part.fix}" for part in missing))
