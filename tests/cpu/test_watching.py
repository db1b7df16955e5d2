"""What is done about steps that look wrong, and what is seen of a run: validation, metrics, marks, slow and hung ranks.

One launch of two ranks (`watching.py`) trains everything; the tests read the run folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_octo import rundir
from megatron_octo.report.load import _read_lines
from megatron_octo.train.state import read_state, saved_steps
from tests.cpu.watching import (
    EXPORT,
    FAULTY,
    HANG_TIMEOUT_S,
    SECRET,
    STEPS,
    STRAGGLER_STEPS,
    VALIDATED,
)
from tests.cpu.zygote import SAID_BYTES, Zygote
from tests.prepared import BATCH, SEQ_LENGTH

FP32_TOLERANCE = 5e-6  # CONTRIBUTING.md
LAUNCH_TIMEOUT_S = 500
WANDB = """
import json, pathlib

class Run:
    def __init__(self, options):
        self.file = (pathlib.Path(options["dir"]) / "wandb.jsonl").open("a")
        self.write(init=options)
    def write(self, **what):
        self.file.write(json.dumps(what) + "\\n")
        self.file.flush()
    def log(self, numbers, step):
        self.write(log=numbers, step=step)
    def finish(self):
        self.write(finish=True)

def init(**options):
    return Run(options)
"""

pytestmark = pytest.mark.timeout(LAUNCH_TIMEOUT_S + 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """Where two ranks have trained everything in `watching.py`, up to the run that hangs."""
    path = tmp_path_factory.mktemp("watching")
    (path / "modules").mkdir()
    (path / "modules" / "wandb.py").write_text(WANDB)
    codes = zygote.call("tests.cpu.watching:main", path, log=path / "log", ranks=2).wait(LAUNCH_TIMEOUT_S)
    rundir.write_json(path / "codes.json", codes)
    assert (path / "trained").exists(), (path / "log").read_text()[-SAID_BYTES:]
    return path


@pytest.fixture
def run(folder: Path):
    """A run's folder, by its name."""
    return lambda name: folder / "runs" / name


@pytest.fixture
def rows(run):
    """The metrics of a run, by its name."""
    return lambda name: _read_lines(run(name) / "metrics.jsonl")


@pytest.fixture
def curve(rows):
    """(loss, gradient norm) of a run's steps, None where there is none."""
    return lambda name: [(row.get("train/loss"), row.get("optim/grad_norm")) for row in rows(name)]


@pytest.fixture
def log(folder: Path) -> str:
    """What the ranks said."""
    return (folder / "log").read_text()


def _skipped(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows if row.get("watch/skipped")]


# ---- steps that look wrong


def test_who_asks_to_stop_is_heard_after_steps_that_were_rolled_back_and_left_out(run, rows):
    assert not rundir.is_done(run("back-stopped"))
    assert saved_steps(run("back-stopped"))[-1] == FAULTY + 1
    assert _skipped(rows("back-stopped")) == [FAULTY - 2, FAULTY - 1, FAULTY]


def test_a_fault_that_is_gone_when_computed_again_leaves_no_trace(curve, log):
    assert curve("passing") == curve("plain")
    assert f"step {FAULTY}: the gradient norm is nan, but not when computed again" in log


def test_the_second_time_draws_the_same_numbers(folder):
    first, second = rundir.read_json(folder / "drawn.json")
    assert first == second


def test_a_fault_that_comes_back_stops_the_run_before_it_is_learned(run, rows):
    message = (run("stopped") / "error").read_text()
    assert f"step {FAULTY}: the gradient norm is nan, and so it is when computed again" in message
    assert "resume from the last save" in message
    assert saved_steps(run("stopped")) == [10]
    assert not rundir.is_done(run("stopped"))
    assert rows("stopped")[-1]["step"] == FAULTY - 1


def test_a_skipped_step_changes_no_weight_and_counts_as_read(curve, rows, run):
    """Going back to the save, and doing the same steps but that one, is the other way to the same losses."""
    plain, skipped, left_out = curve("plain"), curve("skipped"), curve("back-one")
    assert skipped[: FAULTY - 1] == plain[: FAULTY - 1]
    assert skipped[FAULTY - 1] == (plain[FAULTY - 1][0], None)
    assert left_out[FAULTY - 1] == (None, None)
    assert skipped[FAULTY:] == left_out[FAULTY:] != plain[FAULTY:]
    assert _skipped(rows("skipped")) == _skipped(rows("back-one")) == [FAULTY]
    ledgers = [rundir.read_json(rundir.step_folder(run(name), STEPS) / "ledger.json") for name in ("plain", "skipped")]
    assert ledgers[0] == ledgers[1]
    assert ledgers[1]["consumed_tokens"] == STEPS * BATCH * SEQ_LENGTH


def test_a_large_gradient_norm_is_skipped_in_another_layout_too(curve, rows):
    assert _skipped(rows("skipped-pp2-vpp2")) == [FAULTY]
    losses, reference = ([loss for loss, _ in curve(name)] for name in ("skipped-pp2-vpp2", "skipped"))
    assert losses == pytest.approx(reference, abs=FP32_TOLERANCE)


def test_a_loss_spike_is_skipped(curve, rows):
    assert _skipped(rows("skipped-loss")) == [FAULTY]
    assert curve("skipped-loss")[FAULTY:] == curve("skipped")[FAULTY:]


def test_a_run_that_only_skips_stops(run):
    assert "step 3: the loss is nan, after 2 skipped steps in a row" in (run("too-many") / "error").read_text()


def test_a_roll_back_goes_on_from_the_save_without_the_batches_that_led_there(curve, rows, log):
    plain, back = curve("plain"), curve("back-three")
    assert back[: FAULTY - 3] == plain[: FAULTY - 3]
    assert back[FAULTY - 3 : FAULTY] == [(None, None)] * 3
    assert all(loss is not None for loss, _ in back[FAULTY:])
    assert _skipped(rows("back-three")) == [FAULTY - 2, FAULTY - 1, FAULTY]
    assert [row["step"] for row in rows("back-three")] == list(range(1, STEPS + 1))
    assert f"rolled back to step 10, the batches of steps {FAULTY - 2} to {FAULTY} are left out" in log


def test_a_roll_back_under_overlap_is_the_same(curve):
    for ours, theirs in zip(curve("back-three-dp2-overlap"), curve("back-three"), strict=True):
        assert ours == pytest.approx(theirs, abs=FP32_TOLERANCE)


def test_a_save_knows_what_was_left_out_and_a_resume_goes_on_exactly(run, curve):
    watch = read_state(rundir.step_folder(run("back-three"), 15)).watch
    assert watch.left_out == ((FAULTY - 2, FAULTY),)
    assert watch.roll_backs == 1
    assert len(watch.losses) == 8
    for name in ("back-three", "skipped"):
        assert curve(f"{name}-resumed") == curve(name)


def test_without_a_save_there_is_nothing_to_roll_back_to(run):
    assert "there is no save yet to go back to" in (run("back-nowhere") / "error").read_text()


# ---- slow and hung ranks


def test_a_slow_rank_names_itself(log):
    assert "[rank 1 on " in log
    lines = [line for line in log.splitlines() if "a slow rank" in line]
    steps = [f"step {reports * STRAGGLER_STEPS}" for reports in (1, 2)]
    assert [line.split("] ")[1].split(":")[0] for line in lines if "[rank 1" in line] == steps
    assert all("[rank 1" in line for line in lines)


def test_a_hang_leaves_every_ranks_stack_and_ends_the_job(run, folder, log):
    assert 0 not in rundir.read_json(folder / "codes.json")
    for rank, waits_in in ((0, "finalize_model_grads"), (1, "watching.py")):
        stack = (run("hung") / "log" / f"stacks_rank_{rank:05d}.txt").read_text()
        assert waits_in in stack
        assert "train_step" in stack
    assert f"nothing has ended for {HANG_TIMEOUT_S:.0f} s" in log


def test_a_run_that_ends_leaves_no_stacks(run):
    assert not list(run("plain").glob("log/stacks*"))


# ---- validation


def test_validation_changes_nothing_of_the_training(curve):
    assert curve("validated-dp2") == curve("plain")


def test_every_layout_validates_the_same(rows):
    def losses(name: str) -> list[tuple[int, float, float]]:
        return [(row["step"], row["valid/a/loss"], row["valid/b/loss"]) for row in rows(name) if "valid/a/loss" in row]

    reference = losses("validated-alone")
    assert [step for step, _, _ in reference] == [5, 10, 15, 16]
    for name in VALIDATED:
        for ours, theirs in zip(losses(f"validated-{name}"), reference, strict=True):
            assert ours == pytest.approx(theirs, abs=FP32_TOLERANCE)


def test_a_source_is_validated_on_its_own_documents(rows):
    """`a` holds out documents of its rule, which is being learned; `b` holds out noise."""
    valid = [row for row in rows("validated-dp2") if "valid/a/loss" in row]
    assert valid[-1]["valid/a/loss"] < valid[0]["valid/a/loss"] - 0.1
    assert valid[-1]["valid/b/loss"] > 4.0  # ln 61 = 4.11 at best


# ---- what is reported


def test_wandb_gets_every_step_and_goes_on_where_it_was(run, rows):
    first, *logged, last = _read_lines(run("plain") / "wandb.jsonl")
    assert first["init"]["project"] == "project"
    assert first["init"]["resume"] == "allow"
    assert [each["step"] for each in logged] == list(range(1, STEPS + 1))
    assert [each["log"]["train/loss"] for each in logged] == [row["train/loss"] for row in rows("plain")]
    assert last == {"finish": True}


def test_the_key_of_wandb_is_written_nowhere(folder):
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_start_says_what_mfu_would_be(log):
    assert "mfu: not known" in log
    assert "FLOP a token: 6 x (weights of matrices + attention, the causal half of it)" in log


# ---- marks


def test_a_mark_is_saved_exported_and_outlives_the_saves_that_are_kept(run, log):
    assert rundir.is_done(run("marked") / "hf" / "step_00000007")
    assert (run("marked") / EXPORT).exists()
    assert "verified" in (run("marked") / "log" / "mark_00000007.txt").read_text()


def test_what_fails_beside_the_training_is_a_warning(run, log):
    assert rundir.is_done(run("marked"))
    assert "ended with exit code 2, and nothing waits for it" in log
    assert "no problem file" in (run("marked") / "log" / "mark_00000007.txt").read_text()


def test_a_run_is_done_when_what_it_started_has_ended(run):
    log, done = run("marked") / "log" / "mark_00000007.txt", run("marked") / rundir.DONE
    assert log.stat().st_mtime_ns <= done.stat().st_mtime_ns


def test_a_mark_that_is_done_is_not_started_again(run, folder):
    assert rundir.is_done(run("marked-resumed"))
    text = (run("marked-resumed") / "log" / "mark_00000007.txt").read_text()
    assert text == (run("marked") / "log" / "mark_00000007.txt").read_text()
    assert rundir.sha256(run("marked-resumed") / EXPORT) == (folder / "export").read_text()
