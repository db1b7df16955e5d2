"""The rows of metrics.jsonl in TensorBoard's files, beside those that OpenRLHF writes under its own names.

TensorBoard's step is the optimizer update here, as in the paper's figures; OpenRLHF's own are over rollout steps.
"""

from __future__ import annotations

import time
from pathlib import Path

from megatron_octo.rl.collect import Row


class Board:
    """Writes without torch, which would stay in memory during the run."""

    def __init__(self, folder: Path, *, updates_done: int) -> None:
        """Go on after so many updates: what the files have of later ones no longer counts."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        self._writer.add_event(Event(step=updates_done + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, row: Row) -> None:
        """Write a step or its validation; `rl/updates` is where, and `rl/step` the rollout step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        curves = {name: value for name, value in row.items() if "/" in name} | {"rl/step": row["step"]}
        updates = int(curves.pop("rl/updates"))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in curves.items()]
        event = Event(step=updates, wall_time=time.time(), summary=Summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        """Put all on disk."""
        self._writer.close()
