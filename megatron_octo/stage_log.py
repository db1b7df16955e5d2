"""What each stage of a pipeline cost: time and peak memory, an attempt a line in `stages.jsonl`.

The line of a running attempt grows with it, so that a killed pipeline's time is counted too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from megatron_octo.errors import BadInput
from megatron_octo.rundir import write_atomic

FILE = "stages.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One process of one stage, to its end or so far."""

    stage: str
    started: float
    """Unix time, s."""
    seconds: float
    peak_gib: float
    """Largest sum of the proportional set sizes of its processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What one stage cost over all its attempts."""

    stage: str
    seconds: float
    peak_gib: float


def record(folder: Path, attempt: Attempt, *, replace_earlier: bool = False) -> None:
    """Write `attempt` into the log of a pipeline's folder, in place of what it wrote of itself before.

    `replace_earlier` drops the stage's earlier attempts: for one that is made again at each call, such as the report.
    """
    kept = [
        each
        for each in _attempts(folder)
        if each.stage != attempt.stage or not (replace_earlier or each.started == attempt.started)
    ]
    write_atomic(folder / FILE, b"".join(orjson.dumps(asdict(each)) + b"\n" for each in (*kept, attempt)))


def costs(folder: Path) -> list[StageCost]:
    """The stages of a pipeline's folder in the order of their first attempts; none where nothing ran yet.

    Raises:
        BadInput: the log is not one.
    """
    total: dict[str, StageCost] = {}
    for attempt in _attempts(folder):
        old = total.get(attempt.stage, StageCost(stage=attempt.stage, seconds=0.0, peak_gib=0.0))
        total[attempt.stage] = StageCost(
            stage=attempt.stage,
            seconds=old.seconds + attempt.seconds,
            peak_gib=max(old.peak_gib, attempt.peak_gib),
        )
    return list(total.values())


def _attempts(folder: Path) -> Iterator[Attempt]:
    path = folder / FILE
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            yield Attempt(**orjson.loads(line))
        except (orjson.JSONDecodeError, TypeError) as error:
            raise BadInput(f"{path}:{number} is not an attempt: {error}", fix="remove the line") from None
