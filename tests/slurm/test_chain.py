"""A training of two nodes that is stopped again and again, in every way, ends as an unbroken one."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.train.state import saved_steps
from tests.cpu.zygote import rows
from tests.prepared import BATCH, SEQ_LENGTH, stage, write_data
from tests.slurm.cluster import Cluster

SAVE_EVERY = 5
STEPS_AN_EVENT = 160  # an idle machine takes a hundred a second


@dataclass
class Chain:
    """A job, and what can befall it. Each event returns once it has."""

    slurm: Cluster
    checkout: Path
    job: str

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.checkout / "runs" / "chain"

    @property
    def newest_save(self) -> int:
        """The step of its last save."""
        return max(saved_steps(self.run), default=0)

    @property
    def restarts(self) -> int:
        """How often Slurm has started the job again."""
        return int(self.slurm.field(self.job, "Restarts"))

    def nodes(self) -> list[str]:
        """The nodes that it runs on."""
        return self.slurm("scontrol", "show", "hostnames", self.slurm.field(self.job, "NodeList")).split()

    def ranks(self) -> list[int]:
        """Process ids of its ranks."""
        return [pid for pid, argv, _ in self.processes() if argv[1:4] == ["-m", "megatron_octo", "train"]]

    def processes(self) -> Iterator[tuple[int, list[str], str]]:
        """(id, command line, node) of all that it has started."""
        return self.slurm.processes(self.job)

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait until `until` holds, while Slurm may start the job again."""
        self.slurm.wait(self.job, until)

    # ---- events

    def time_limit(self) -> None:
        """The limit is near: Slurm sends USR1 to the batch script, as it does 900 s before."""
        hours, minutes, _ = map(int, self.slurm.field(self.job, "RunTime").split(":"))
        self.slurm("scontrol", "update", f"JobId={self.job}", f"TimeLimit={60 * hours + minutes + 5}")

    def preemption(self) -> None:
        """A job of a higher tier wants all nodes."""
        urgent = ["--partition=urgent", f"--nodes={self.slurm.nodes}", "--exclusive", "--output=/dev/null"]
        other = self.slurm("sbatch", "--parsable", *urgent, "--wrap=true")
        assert self.slurm.wait_end(other) == "COMPLETED"

    def requeue(self) -> None:
        """Someone requeues it."""
        self.slurm("scontrol", "requeue", self.job)

    def killed_rank(self) -> None:
        """The kernel kills a rank, for its memory, say."""
        os.kill(self.ranks()[-1], signal.SIGKILL)

    def node_down(self) -> None:
        """A node dies with all that runs on it, the batch script included."""
        node = self.nodes()[0]
        self.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        for pid, _, where in self.processes():
            if where == node:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait(lambda: self.slurm.state(self.job) != "RUNNING")
        self.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # it may be back by itself

    def bad_node(self) -> None:
        """A GPU falls off the bus between two starts: the next preflight fails."""
        node = self.nodes()[0]
        before = self.restarts
        (self.checkout / "bin" / node).touch()
        self.slurm("scancel", "--batch", "--signal=USR1", self.job)
        self.wait(lambda: self.restarts >= before + 2)
        (self.checkout / "bin" / node).unlink()
        assert node in self.slurm.field(self.job, "ExcNodeList")


EVENTS = (Chain.killed_rank, Chain.time_limit, Chain.bad_node, Chain.requeue, Chain.preemption, Chain.node_down)


@pytest.fixture
def recipe(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], Path]:
    """Writes the settings of a run of so many steps."""
    monkeypatch.setenv("OCTO_RUNS", str(checkout / "runs"))
    write_data(checkout / "data")

    def write(name: str, steps: int, save_every: int) -> Path:
        config = replace(stage(checkout / "data", name, steps=steps, save_every=save_every), log_every_steps=10)
        rundir.write_json(checkout / f"{name}.json", to_dict(config))
        return checkout / f"{name}.json"

    return write


def submit(slurm: Cluster, checkout: Path, recipe: Path) -> str:
    """Start a run on two nodes with a rank each."""
    shape = ["--nodes=2", "--gpus-per-node=1", "--time=1:00:00"]
    return slurm("sbatch", "--parsable", *shape, "slurm/stable_200b.sh", "--recipe", recipe, cwd=checkout)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_events", [2, pytest.param(24, marks=pytest.mark.slow)])
def test_a_training_that_is_stopped_in_every_way_ends_as_an_unbroken_one(
    slurm: Cluster, checkout: Path, recipe: Callable[[str, int, int], Path], num_events: int
):
    num_steps = STEPS_AN_EVENT * num_events
    unbroken = submit(slurm, checkout, recipe("unbroken", num_steps, num_steps))
    assert slurm.wait_end(unbroken, 1200) == "COMPLETED"
    assert slurm.field(unbroken, "Restarts") == "0"

    chain = Chain(slurm, checkout, submit(slurm, checkout, recipe("chain", num_steps, SAVE_EVERY)))
    happened = 0
    for event in itertools.islice(itertools.cycle(EVENTS), num_events):
        chain.wait(lambda: slurm.state(chain.job) == "RUNNING" and len(chain.ranks()) == 2)
        saved, restarts = chain.newest_save, chain.restarts
        chain.wait(lambda saved=saved: chain.newest_save > saved)
        assert not rundir.is_done(chain.run), "it was done before all events had happened"
        event(chain)
        chain.wait(lambda restarts=restarts: chain.restarts > restarts)
        if event is Chain.time_limit:
            said = (checkout / "runs" / "slurm" / f"{chain.job}.{restarts}" / "state").read_text()
            (step,) = re.findall("^requeued asked to end, and its last save is of step (\\d+)$", said)
            assert int(step) > saved
        slurm("scontrol", "update", f"JobId={chain.job}", "TimeLimit=1:00:00", check=False)
        happened += 1
    assert happened == num_events
    assert chain.restarts >= num_events
    chain.wait(lambda: (chain.run / "metrics.jsonl").exists() and len(chain.ranks()) == 2)
    (chain.run / "STOP").touch()
    assert slurm.wait_end(chain.job) == "COMPLETED"
    assert not rundir.is_done(chain.run)
    job = submit(slurm, checkout, checkout / "chain.json")
    assert slurm.wait_end(job, 1200) == "COMPLETED"
    assert rundir.is_done(chain.run)
    assert rows(chain.run) == rows(checkout / "runs" / "unbroken")
    last = rundir.read_json(rundir.step_folder(chain.run, num_steps) / "state.json")
    assert last["tokens"] == num_steps * BATCH * SEQ_LENGTH
    assert [step for step, *_ in rows(chain.run)] == list(range(1, num_steps + 1))
