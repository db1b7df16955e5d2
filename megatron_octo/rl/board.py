"""The rows of metrics.jsonl in TensorBoard's files, beside those that OpenRLHF writes under its own names."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_octo.rl.collect import Row


class Board:
    """Writes without torch, which would stay in memory during the run."""

    def __init__(self, folder: Path, *, done: int) -> None:
        """Go on after `done` steps: what the files have of later ones no longer counts."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        self._writer.add_event(Event(step=done + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, row: Row) -> None:
        """Write a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if "/" in name]
        event = Event(step=int(row["step"]), wall_time=time.time(), summary=Summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        """Put all on disk."""
        self._writer.close()
