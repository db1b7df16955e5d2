"""Saves: whatever kills, fails or changes a byte, a run goes on from a good one, to the very same losses.

In the slow tier at least 1,000 faults are injected: 20 kills, 3 x 180 failures of the disk, 500 damages to files.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_octo import checksums, lineage, rundir
from megatron_octo.config.train import FromRun, ParallelConfig, SaveConfig
from megatron_octo.convert.torch_dist import Reader
from megatron_octo.train.saver import newest_good
from megatron_octo.train.state import read_state, saved_steps
from tests.conftest import flip_bit, snapshot
from tests.cpu.zygote import Zygote, octo, rows
from tests.prepared import BATCH, stage, write_data

pytestmark = pytest.mark.timeout(600)
OLD, NEW = 4, 5  # the steps of a template's saves


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all stages."""
    folder = tmp_path_factory.mktemp("saves") / "data"
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def template(data: Path, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank that ended after its saves, as it would be had it been killed before it said DONE."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTO_RUNS", str(folder))
        config = stage(data, "run", steps=NEW, save_every=OLD)
        assert octo(zygote, config, folder).wait() == [0]
    (folder / "run" / rundir.DONE).unlink()
    return folder / "run"


@pytest.fixture
def run(template: Path, runs: Path) -> Path:
    """A copy of the template."""
    shutil.copytree(template, runs / "run")
    return runs / "run"


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def numbers(save: Path) -> dict[str, torch.Tensor]:
    """All tensors of a save."""
    reader = Reader(save)
    return {key: reader.read(key) for key in list(reader.keys())}


# ---- killed


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_two_ranks_killed_anywhere_go_on_to_the_very_losses_of_the_unbroken_run(
    num_kills: int, data: Path, runs: Path, tmp_path: Path, zygote: Zygote
) -> None:
    draw, run = random.Random(num_kills), runs / "killed"
    config = stage(data, "whole", steps=8 * num_kills + 4, save_every=4)
    assert octo(zygote, config, tmp_path, ranks=2).wait() == [0, 0]
    whole, config = rows(runs / "whole"), replace(config, name="killed")
    for _ in range(num_kills):
        ranks = octo(zygote, config, tmp_path, ranks=2)
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, 1.5))  # in its start
        else:
            goal = max(saved_steps(run), default=0) + draw.randint(1, 8)
            ranks.wait_until(lambda goal=goal: len(rows(run)) >= goal)
            time.sleep(draw.uniform(0, 0.2))
        ranks.send(signal.SIGKILL, *draw.choice([(0,), (1,), (0, 1)]))
        assert -signal.SIGKILL in ranks.wait(20), "the run ended before it was killed"
        assert rows(run) == whole[: len(rows(run))]
    assert octo(zygote, config, tmp_path, ranks=2).wait() == [0, 0]
    assert rows(run) == whole
    assert len(whole) == config.num_steps
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        *(f"step_{step:08d}" for step in (config.num_steps - 4, config.num_steps)),
    ]


# ---- asked


@pytest.mark.parametrize("how", ["SIGUSR1 to rank 1", "SIGTERM to all", "STOP"])
def test_asked_to_stop_all_ranks_save_the_same_step_and_end_well(
    how: str, data: Path, runs: Path, tmp_path: Path, zygote: Zygote
) -> None:
    config, run = stage(data, "run", steps=4000, save_every=4000), runs / "run"
    ranks = octo(zygote, config, tmp_path, ranks=2)
    ranks.wait_until(lambda: len(rows(run)) >= 2)
    if how == "STOP":
        (run / "STOP").touch()
    else:
        ranks.send(signal.Signals[how.partition(" ")[0]], *[1] * how.endswith("1"))
    assert ranks.wait() == [0, 0]
    last = len(rows(run))
    assert saved_steps(run) == [last] == [rows(run)[-1][0]]
    assert f"stopped after step {last}" in (tmp_path / "log").read_text()
    assert not rundir.is_done(run)
    assert not (run / "STOP").exists()


def test_a_signal_in_a_steps_forward_pass_ends_the_run_after_that_step(
    data: Path, runs: Path, tmp_path: Path, zygote: Zygote
) -> None:
    before = ("tests.cpu.faults:signal_in_forward", 3, BATCH, "1")
    assert octo(zygote, stage(data, "run", steps=5), tmp_path, ranks=2, before=before).wait() == [0, 0]
    assert saved_steps(runs / "run") == [3]
    assert "stopped after step 3, saved" in (tmp_path / "log").read_text()


def test_a_file_asks_for_a_save_and_training_goes_on(data: Path, runs: Path, tmp_path: Path, zygote: Zygote) -> None:
    run = runs / "run"
    ranks = octo(zygote, stage(data, "run", steps=4000, save_every=4000), tmp_path, ranks=2)
    ranks.wait_until(lambda: len(rows(run)) >= 2)
    (run / "SAVE").touch()
    ranks.wait_until(lambda: len(saved_steps(run)) == 1)
    assert not (run / "SAVE").exists()
    steps = len(rows(run))
    ranks.wait_until(lambda: len(rows(run)) > steps)
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [0, 0]
    assert len(saved_steps(run)) == 2


def test_every_rank_saves_when_rank_0s_clock_says_so(data: Path, runs: Path, tmp_path: Path, zygote: Zygote) -> None:
    config = replace(stage(data, "run", steps=5), save=SaveConfig(every_minutes=1e-9, keep_last=9))
    assert octo(zygote, config, tmp_path, ranks=2).wait() == [0, 0]
    assert saved_steps(runs / "run") == [1, 2, 3, 4, 5]


def test_saves_at_multiples_of_tokens_stay(data: Path, runs: Path, tmp_path: Path, zygote: Zygote) -> None:
    config = stage(data, "run", steps=11)
    save = SaveConfig(every_tokens=config.batch_tokens, keep_last=1, keep_every_tokens=4 * config.batch_tokens)
    assert octo(zygote, replace(config, save=save), tmp_path).wait() == [0]
    assert saved_steps(runs / "run") == [4, 8, 11]


def test_a_save_holds_its_own_step_though_training_goes_on_while_it_is_written(
    data: Path, runs: Path, tmp_path: Path, zygote: Zygote
) -> None:
    config = replace(
        stage(data, "slowly", steps=12),
        save=SaveConfig(every_steps=OLD, keep_last=9),
        parallel=ParallelConfig(distributed_optimizer=False),  # the distributed one gathers its state into new tensors
    )
    slowly, at_once = runs / "slowly", runs / "at_once"
    ranks = octo(zygote, config, tmp_path, ranks=2, before=("tests.cpu.faults:write_slowly", 1.5))
    ranks.wait_until(lambda: len(rows(slowly)) > OLD)
    assert saved_steps(slowly) == []
    assert ranks.wait() == [0, 0]
    before = ("tests.cpu.faults:write_at_once",)
    assert octo(zygote, replace(config, name="at_once"), tmp_path, ranks=2, before=before).wait() == [0, 0]
    for step in (4, 8, 12):
        found, wanted = (numbers(rundir.step_folder(run, step)) for run in (slowly, at_once))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


# ---- failures of the disk


def chosen(operations: list[str], every_write: int, every_other: int) -> list[int]:
    """Numbers of operations to fail: each so-manieth write, and each so-manieth of the others."""
    writes = [number for number, line in enumerate(operations, 1) if line.startswith("write ")]
    others = [number for number, line in enumerate(operations, 1) if not line.startswith("write ")]
    return writes[::every_write] + others[::every_other]


@pytest.mark.parametrize(
    ("every_write", "every_other", "at_least"),
    [(140, 16, 4), pytest.param(1, 1, 180, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
@pytest.mark.parametrize("mode", ["kill", "error", "full"])
def test_wherever_a_save_breaks_a_good_one_is_selected(
    *,
    mode: str,
    every_write: int,
    every_other: int,
    at_least: int,
    data: Path,
    template: Path,
    runs: Path,
    tmp_path: Path,
    zygote: Zygote,
    alone: None,
) -> None:
    good = {step: numbers(rundir.step_folder(template, step)) for step in (OLD, NEW)}
    config, run, record = stage(data, "run", steps=NEW, save_every=OLD), runs / "run", tmp_path / "operations"

    def attempt(at: int) -> int:
        """Go on from the older save, with a fault in the making of the newer one."""
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        shutil.rmtree(rundir.step_folder(run, NEW))
        record.unlink(missing_ok=True)
        before = ("tests.cpu.faults:install", mode, at, str(record))
        (code,) = octo(zygote, config, tmp_path, before=before).wait()
        return int(code)

    assert attempt(0) == 0
    operations = record.read_text().splitlines()
    assert {line.split()[0] for line in operations} >= {"open", "write", "fsync", "replace", "rename", "mkdir"}
    selected = []
    for at in chosen(operations, every_write, every_other):
        code = attempt(at)
        save = newest_good(run)
        assert save is not None
        step = read_state(save).step
        assert code == (-signal.SIGKILL if mode == "kill" else 1) or (code == 0 and step == NEW), operations[at - 1]
        assert save == rundir.step_folder(run, step)
        found = numbers(save)
        assert found.keys() == good[step].keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in good[step].items())
        if mode != "kill":
            assert "was not saved: rank 0" in (tmp_path / "log").read_text() or step == NEW
            assert not list((run / "checkpoints").glob(".*.tmp"))
        selected.append(step)
    assert OLD in selected
    assert len(selected) >= at_least
    assert octo(zygote, config, tmp_path).wait() == [0]
    assert rows(run) == rows(template)


def test_a_full_disk_of_any_rank_stops_all_with_its_message(
    data: Path, runs: Path, tmp_path: Path, zygote: Zygote, alone: None
) -> None:
    config, run = stage(data, "run", steps=16, save_every=8), runs / "run"
    ranks = octo(zygote, config, tmp_path, ranks=2)
    ranks.wait_until(lambda: bool(saved_steps(run)))
    ranks.send(signal.SIGKILL)
    ranks.wait()
    before = ("tests.cpu.faults:install", "full", 2, str(tmp_path / "operations"), "1")
    assert octo(zygote, config, tmp_path, ranks=2, before=before).wait() == [1, 1]
    log = (tmp_path / "log").read_text()
    assert "step_00000016 was not saved: rank 1 on" in log
    assert "No space left on device" in log
    assert newest_good(run) == rundir.step_folder(run, 8)
    assert octo(zygote, config, tmp_path, ranks=2).wait() == [0, 0]


def test_a_stop_file_whose_save_failed_is_heeded_by_the_next_start(
    data: Path, runs: Path, tmp_path: Path, zygote: Zygote
) -> None:
    config, run = stage(data, "run", steps=4000, save_every=4000), runs / "run"
    run.mkdir(parents=True)
    (run / "STOP").touch()
    before = ("tests.cpu.faults:install", "full", 2, str(tmp_path / "operations"))
    assert octo(zygote, config, tmp_path, before=before).wait() == [1]
    assert (run / "STOP").exists()
    assert octo(zygote, config, tmp_path).wait() == [0]
    assert saved_steps(run) == [1]
    assert not (run / "STOP").exists()


# ---- changed bytes


def damages(path: Path, count: int, draw: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Ways in which a file may be broken: what was done to it, its content then (None: it is gone)."""
    content = path.read_bytes()
    yield "removed", None
    yield "emptied", b""
    yield "with a byte more", content + b"\0"
    offsets = sorted({0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count))})
    for offset in offsets:
        yield f"cut at {offset}", content[:offset]
        flipped = bytes([content[offset] ^ 1 << draw.randrange(8)])
        yield f"one bit flipped at {offset}", content[:offset] + flipped + content[offset + 1 :]


@pytest.mark.parametrize(
    ("count", "at_least"), [(2, 90), pytest.param(40, 500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_a_save_with_a_changed_byte_is_never_selected(
    count: int, at_least: int, run: Path, alone: None, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = (rundir.step_folder(run, step) for step in (OLD, NEW))
    aside, draw, faults = new.with_name(f"damaged_{new.name}"), random.Random(count), 0
    assert newest_good(run) == new
    for path in sorted(new.iterdir()):
        whole = path.read_bytes()
        for what, content in damages(path, count, draw):
            caplog.clear()
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            assert newest_good(run) == old, f"{path.name} {what}"
            assert f"{new} is damaged ({path.name}" in caplog.text or path.name in (rundir.DONE, checksums.FILE)
            assert (run / "checkpoints" / "latest").read_text() == f"{OLD}\n"
            aside.replace(new)
            path.write_bytes(whole)
            faults += 1
    assert newest_good(run) == new
    assert faults >= at_least


def test_without_a_good_save_a_run_is_refused_and_left_as_it_is(
    run: Path, data: Path, tmp_path: Path, zygote: Zygote
) -> None:
    for step in (OLD, NEW):
        path = rundir.step_folder(run, step) / "__0_0.distcp"
        path.write_bytes(path.read_bytes()[:1000])
    before = snapshot(run / "checkpoints")
    assert octo(zygote, stage(data, "run", steps=NEW, save_every=OLD), tmp_path).wait() == [2]
    log = (tmp_path / "log").read_text()
    assert "none of them is good" in log
    assert all(f"step_{step:08d}: __0_0.distcp is not as it was written" in log for step in (OLD, NEW))
    assert snapshot(run / "checkpoints") == before


def test_a_run_goes_on_from_the_save_before_a_damaged_one(
    run: Path, template: Path, data: Path, tmp_path: Path, zygote: Zygote
) -> None:
    (rundir.step_folder(run, NEW) / "lineage.json").write_text('{"na')
    config = stage(data, "run", steps=NEW, save_every=OLD)
    assert octo(zygote, config, tmp_path).wait() == [0]
    log = (tmp_path / "log").read_text()
    assert "step_00000005 is damaged (lineage.json is not as it was written" in log
    assert "resumed after step 4" in log
    assert rows(run) == rows(template)
    assert numbers(rundir.step_folder(run, NEW)).keys() == numbers(rundir.step_folder(template, NEW)).keys()


def test_a_branch_does_not_start_from_a_damaged_save(run: Path, data: Path, tmp_path: Path, zygote: Zygote) -> None:
    (rundir.step_folder(run, OLD) / "model.json").open("a").write(" ")
    branch = replace(stage(data, "branch", steps=2), start=FromRun(run="run", step=OLD))
    assert octo(zygote, branch, tmp_path).wait() == [2]
    assert "is damaged: model.json is not as it was written" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", ["state.json", "__0_0.distcp"])
def test_a_branch_that_names_no_save_starts_from_the_newest_good_one_and_says_so(
    name: str, run: Path, data: Path, tmp_path: Path, zygote: Zygote
) -> None:
    flip_bit(rundir.step_folder(run, NEW) / name)
    rundir.mark_done(run)
    before = snapshot(run)
    branch = replace(stage(data, "branch", steps=2), start=FromRun(run="run"))
    assert octo(zygote, branch, tmp_path).wait() == [0]
    log = (tmp_path / "log").read_text()
    assert f"step_00000005 is damaged ({name} is not as it was written: its checksum differs)" in log
    assert "starts from the parent's step 4, not from its step 5" in log
    parent = lineage.read(run.with_name("branch")).parent
    assert parent is not None and parent.step == OLD
    assert snapshot(run) == before


# ---- code in a save


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def plant(save: Path, place: str, payload: Payload) -> None:
    """Put code into a save, and give it the right checksums."""
    index = pickle.loads((save / ".metadata").read_bytes())
    if place == "index":
        index.planner_data = payload
    elif place == "common.pt":
        torch.save({"args": payload}, save / "common.pt")
    else:
        record = torch.frombuffer(bytearray(pickle.dumps(payload)), dtype=torch.uint8)
        blob = io.BytesIO()
        torch.save([record if place == "_extra_state" else payload], blob)
        where = next(each for each in index.storage_data if place in each.fqn)
        info = index.storage_data[where]
        info.relative_path, info.offset, info.length = "planted.distcp", 0, len(blob.getvalue())
        (save / "planted.distcp").write_bytes(blob.getvalue())
    (save / ".metadata").write_bytes(pickle.dumps(index))
    for name in (rundir.DONE, checksums.FILE):
        (save / name).unlink()
    checksums.seal(save, {})


@pytest.mark.parametrize("place", ["index", "common.pt", "common_state", "random", "_extra_state"])
def test_code_planted_in_a_save_does_not_run(
    *, place: str, run: Path, data: Path, tmp_path: Path, zygote: Zygote, alone: None
) -> None:
    save, mark = rundir.step_folder(run, OLD), tmp_path / "ran"
    shutil.rmtree(rundir.step_folder(run, NEW))
    plant(save, place, Payload(mark))
    assert newest_good(run) == save, "the planted save passes for a good one"
    (code,) = octo(zygote, stage(data, "run", steps=NEW, save_every=OLD), tmp_path).wait()
    assert not mark.exists()
    assert code == 2, (tmp_path / "log").read_text()[-2000:]
    assert "mkdir" in (tmp_path / "log").read_text()
