"""Marks: a save on the way becomes an export and scores, by `octo convert` and `octo evaluate` beside the training.

What is done is what has its DONE: a resumed run starts what was cut off and nothing else. A failure is a warning. The
end of the stage waits for what is under way; a run that was asked to stop does not.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from megatron_octo.config.base import to_dict
from megatron_octo.config.evaluate import ScoredModel
from megatron_octo.console import logger
from megatron_octo.platform.process import octo_command, stop, tied_child
from megatron_octo.platform.process_group import launchers_variables
from megatron_octo.rundir import is_done, step_folder, write_json
from megatron_octo.train.state import saved_steps

if TYPE_CHECKING:
    from megatron_octo.config.train import MidTrainConfig


POLL_S = 0.5
LEAVE_GRACE_S = 3.0


class Marks:
    """One mark's processes at a time, in the order of the marks. Rank 0 alone makes one of these."""

    def __init__(self, run: Path, config: MidTrainConfig) -> None:
        self._run, self._config = run, config
        self._waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._tried: set[int] = set()
        self._left = threading.Event()
        self.in_use: set[int] = set()
        """Steps whose saves are still to be read: they are to be kept."""

    def start(self) -> None:
        """Convert and evaluate the saves at marks for which that is neither done nor tried; returns at once."""
        tokens = self._config.batch_tokens
        for step in saved_steps(self._run):
            is_mark = self._config.marks.reached((step - 1) * tokens, step * tokens)
            if is_mark and step not in self._tried and not all(map(is_done, self._outputs(step))):
                self._tried.add(step)
                self.in_use.add(step)
                self._waiting.put(step)

    def work(self) -> None:
        """Do what was started, until `end`."""
        while (step := self._waiting.get()) is not None and not self._left.is_set():
            try:
                self._do(step)
            except OSError as error:
                logger(__name__).warning("step %s: its mark failed, and nothing waits for it: %s", f"{step:,}", error)
            self.in_use.discard(step)

    def leave(self) -> None:
        """Cut off what is under way: the run was asked to stop."""
        self._left.set()

    def end(self) -> None:
        """Have `work` return once all is done, or cut off."""
        if self.in_use and not self._left.is_set():
            steps = ", ".join(f"{step:,}" for step in sorted(self.in_use))
            logger(__name__).info("waiting for the export of step %s, and its scores if it has any", steps)
        self._waiting.put(None)

    def _do(self, step: int) -> None:
        log = self._run / "log" / f"mark_{step:08d}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as output:
            if all(self._octo(command, step, output) for command in self._commands(step)):
                logger(__name__).info("step %s: %s", f"{step:,}", ", ".join(map(str, self._outputs(step))))

    def _outputs(self, step: int) -> list[Path]:
        """The export, and the scores if there is an evaluation."""
        name, evaluation = step_folder(self._run, step).name, self._config.marks.evaluate
        return [self._run / "hf" / name, *([self._run / "scores" / name / evaluation.task] if evaluation else [])]

    def _commands(self, step: int) -> Iterator[list[str]]:
        export, *scores = self._outputs(step)
        if not is_done(export):
            yield ["convert", "to-hf", str(step_folder(self._run, step)), str(export)]
        if scores:
            settings = scores[0].with_suffix(".json")
            assert self._config.marks.evaluate is not None
            models = (ScoredModel(model=export, output=scores[0]),)
            write_json(settings, to_dict(replace(self._config.marks.evaluate, models=models)))
            yield ["evaluate", str(settings)]

    def _octo(self, command: list[str], step: int, output: IO[str]) -> bool:
        """Run one command to its end; whether it succeeded."""
        devices = {"CUDA_VISIBLE_DEVICES": self._config.marks.devices}
        argv = octo_command(*command)
        with tied_child(argv, env=devices, without=launchers_variables(), output=output) as child:
            while (code := child.poll()) is None and not self._left.wait(POLL_S):
                pass
            if code is None:
                stop(child, grace_s=LEAVE_GRACE_S)
                logger(__name__).info(
                    "step %s: `octo %s` was cut off; a resume starts it again", f"{step:,}", command[0]
                )
                return False
        if code != 0:
            logger(__name__).warning(
                "step %s: `octo %s` ended with exit code %d, and nothing waits for it; %s says why",
                f"{step:,}",
                " ".join(command),
                code,
                output.name,
            )
        return code == 0


@contextlib.contextmanager
def marks(run: Path, config: MidTrainConfig) -> Iterator[Marks]:
    """Yield the run's marks; at the end wait for what they started, or cut it off if it was left.

    An error ends that with this process.
    """
    ours = Marks(run, config)
    worker = threading.Thread(target=ours.work, daemon=True)
    worker.start()
    yield ours
    ours.end()
    worker.join()
