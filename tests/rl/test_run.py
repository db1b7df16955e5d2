"""A run around OpenRLHF, with OpenRLHF left out: checks, following, resuming, finishing."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo import lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.rl import LongerResponses, RLConfig, RLWatchConfig, ValidationConfig, ValidationSet
from megatron_octo.errors import BadInput, OctoError, SettingsError, StoppedByWatch, VerificationError
from megatron_octo.lineage import Lineage
from megatron_octo.rl import collect, preflight, run, saves
from megatron_octo.rl.cluster import RunFailed, meaningful
from megatron_octo.rl.run import run_all
from tests.conftest import snapshot

Replaced = Callable[..., RLConfig]


def step(number: int, **values: float) -> str:
    usual = {"acc": 0.5, "vllm_kl": 1e-4, "actor_grad_norm": 1.0, "policy_loss": 0.0, "rollout/reward_mean": 0.0}
    reported = {**usual, "rollout/response_length_mean": 10.0, **values}
    return f"(PPOTrainer pid=1) INFO ppo_trainer.py:551] Global step {number}: {reported}"


def validation(number: int, accuracy: float) -> str:
    return f"Evaluation completed in 0:00:01, global_step {number}, eval_metrics: {{'eval_toy_pass1': {accuracy}}}"


class FakeEngine:
    """Stands for the Ray cluster: prints lines, and leaves OpenRLHF's final folder."""

    def __init__(self, lines: Sequence[str], failure: str = "") -> None:
        self.lines, self.failure, self.runs = lines, failure, 0

    def run(self, arguments: Sequence[str], on_line: Callable[[str], None], until: Callable[[], bool]) -> bool:
        self.runs += 1
        flags = dict(itertools.pairwise(arguments))
        for line in self.lines:
            on_line(line)
        if self.failure:
            raise RunFailed(self.failure)
        final = Path(flags["--ckpt.output_dir"])
        final.mkdir(parents=True)
        (final / "model.safetensors").write_bytes(b"better")
        (final / "config.json").write_text("{}")
        return True


Use = Callable[[FakeEngine], FakeEngine]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Have runs use an engine; no GPU, and no OpenRLHF to check the command line."""

    def install(engine: FakeEngine) -> FakeEngine:
        @contextmanager
        def opened(**_: Any) -> Iterator[FakeEngine]:
            yield engine

        monkeypatch.setattr(run, "cluster", opened)
        monkeypatch.setattr(preflight, "check_command", lambda arguments: None)
        monkeypatch.setattr(preflight, "check_versions", lambda: None)
        monkeypatch.setattr(preflight, "check_flash_attention", lambda: None)
        monkeypatch.setattr(run, "has_gpu", lambda: False)
        return engine

    return install


class SavingEngine(FakeEngine):
    """Goes on from the last checkpoint, saves each step, and is stopped where it is asked to."""

    def __init__(self, line: Callable[[int, int], str] = lambda number, run: step(number)) -> None:
        super().__init__([])
        self.line = line
        """Of a step, in a run of OpenRLHF (the first is 0)."""
        self.stages: list[tuple[int, str]] = []
        """The step after which each run began, and its longest response."""
        self.seeds: list[str] = []

    def run(self, arguments: Sequence[str], on_line: Callable[[str], None], until: Callable[[], bool]) -> bool:
        flags = dict(itertools.pairwise(arguments))
        actor = Path(flags["--ckpt.path"]) / "_actor"
        done = int((actor / "latest").read_text().removeprefix("global_step")) if (actor / "latest").exists() else 0
        self.stages.append((done, flags["--rollout.max_new_tokens"]))
        self.seeds.append(flags["--train.seed"])
        for number in range(done + 1, int(flags["--ckpt.max_num"]) + 1):
            on_line(self.line(number, len(self.stages) - 1))
            (actor / f"global_step{number}").mkdir(parents=True)
            (actor / "latest").write_text(f"global_step{number}")
            if until():
                return False
            write_openrlhf_copy(actor.parent / f"global_step{number}_hf")
            if until():
                return False
        return super().run(arguments, on_line, until)


@pytest.fixture
def asked(tmp_path: Path) -> ValidationConfig:
    """Two problems, after each step."""
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"input": f"{i}+2", "label": str(i + 2)}) + "\n" for i in range(2)))
    return ValidationConfig(
        sets=(ValidationSet(name="toy", prompts=path),), every_steps=1, max_prompt_tokens=8, max_response_tokens=16
    )


def test_validation_reaches_the_metrics_and_the_console(
    replaced: Replaced, asked: ValidationConfig, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    use(FakeEngine([step(1), validation(1, 0.25), step(2), validation(2, 0.5)]))
    config = replaced(validation=asked)
    run_all([config])
    rows = collect.read_metrics(config.output / "metrics.jsonl")
    assert [(row["rl/accuracy"], row["valid/toy/accuracy"]) for row in rows] == [(0.5, 0.25), (0.5, 0.5)]
    assert "step 1  validation  toy 25.0%" in caplog.text
    written = [json.loads(line) for line in (config.output / "validation.jsonl").read_text().splitlines()]
    assert written[0] == {"input": "0+2", "label": {"validation": "2"}, "datasource": "toy"}
    assert "AgentExecutor = executor(" in (config.output / "openrlhf/agent.py").read_text()


def test_a_stage_ends_after_the_validation_of_its_last_step(
    replaced: Replaced, asked: ValidationConfig, use: Use
) -> None:
    class Engine(SavingEngine):
        stopped_at_save = 0

        def run(self, arguments: Sequence[str], on_line: Callable[[str], None], until: Callable[[], bool]) -> bool:
            def asks() -> bool:
                number = int((actor / "latest").read_text().removeprefix("global_step"))
                if not (actor.parent / f"global_step{number}_hf").exists():
                    return until()
                self.stopped_at_save += until()
                on_line(validation(number, 0.5))
                return until()

            actor = Path(dict(itertools.pairwise(arguments))["--ckpt.path"]) / "_actor"
            return super().run(arguments, on_line, asks)

    engine = Engine()
    use(engine)
    config = replaced(num_steps=3, longer_responses=SCHEDULE, validation=asked)
    run_all([config])
    assert engine.stages == [(0, "16"), (1, "20"), (2, "24")] and engine.stopped_at_save == 0
    rows = collect.read_metrics(config.output / "metrics.jsonl")
    assert [row["valid/toy/accuracy"] for row in rows] == [0.5] * 3


def write_openrlhf_copy(folder: Path) -> Path:
    """A Hugging Face folder as OpenRLHF leaves it: tokenizer.json comes last."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    (folder / "tokenizer.json").write_text("{}")
    return folder


SCHEDULE = (
    LongerResponses(after_step=1, max_response_tokens=20),
    LongerResponses(after_step=2, max_response_tokens=24),
)


def test_a_length_schedule_is_a_chain_of_runs_that_go_on_from_each_other(
    replaced: Replaced, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, opened = SavingEngine(), []
    use(engine)
    clusters = run.cluster
    monkeypatch.setattr(run, "cluster", lambda **options: opened.append(1) or clusters(**options))
    config = replaced(num_steps=3, longer_responses=SCHEDULE)
    run_all([config])
    assert engine.stages == [(0, "16"), (1, "20"), (2, "24")]
    assert len(opened) == 3, "what ran beyond a border must be gone before the next stage"
    assert [row["step"] for row in collect.read_metrics(config.output / "metrics.jsonl")] == [1, 2, 3]
    assert saves.copies(config.output) == [2, 3], "a run ends at a border when its copy is whole"
    assert rundir.is_done(config.output)


def test_a_run_killed_in_its_second_stage_goes_on_in_it(replaced: Replaced, use: Use) -> None:
    engine, config = SavingEngine(), replaced(num_steps=3, longer_responses=SCHEDULE[:1])
    actor = config.output / "openrlhf" / "_actor"
    (actor / "global_step2").mkdir(parents=True)
    (actor / "latest").write_text("global_step2")
    use(engine)
    with pytest.raises(
        VerificationError, match="reported 1 steps instead of 3"
    ):  # the metrics went with the killed run
        run_all([config])
    assert engine.stages == [(2, "20")]


def test_a_stop_file_ends_a_run_after_its_next_save_and_leaves_those_that_follow(
    replaced: Replaced, use: Use, tmp_path: Path
) -> None:
    stop = replaced().output / "STOP"

    def line(number: int, openrlhf: int) -> str:
        if (number, openrlhf) == (3, 0):
            stop.touch()  # found when step 3 is saved already
        return step(number)

    engine = SavingEngine(line)
    use(engine)
    both = [replaced(num_steps=5), replaced(num_steps=5, output=tmp_path / "other")]
    assert run_all(both) == []
    assert saves.copies(both[0].output)[-1] == 4 and not stop.exists() and not both[1].output.exists()
    assert run_all(both) == [config.output / "hf" for config in both]
    assert engine.stages == [(0, "16"), (4, "16"), (0, "16")]
    assert [row["step"] for row in collect.read_metrics(both[0].output / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_stop_file_does_not_take_an_earlier_save_for_the_next(replaced: Replaced, use: Use) -> None:
    class Engine(SavingEngine):
        """Saves every second step."""

        def run(self, arguments: Sequence[str], on_line: Callable[[str], None], until: Callable[[], bool]) -> bool:
            actor = Path(dict(itertools.pairwise(arguments))["--ckpt.path"]) / "_actor"
            for number in range(1, 5):
                on_line(step(number))
                if number == 3:
                    (config.output / "STOP").touch()
                if number % 2 == 0:
                    (actor / f"global_step{number}").mkdir(parents=True)
                    (actor / "latest").write_text(f"global_step{number}")
                    write_openrlhf_copy(actor.parent / f"global_step{number}_hf")
                if until():
                    return False
            raise AssertionError("not stopped")

    use(Engine())
    config = replaced(num_steps=6, save_every_steps=2)
    assert run_all([config]) == [] and saves.last(config.output) == 4


def test_a_run_that_ends_by_itself_is_not_stopped_before_its_end(replaced: Replaced, use: Use) -> None:
    config = replaced(num_steps=2)

    def line(number: int, openrlhf: int) -> str:
        if number == 2:
            (config.output / "STOP").touch()
        return step(number)

    use(SavingEngine(line))
    assert run_all([config]) == [config.output / "hf"]


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ([(0, 8)], "after_step 0 is not between 0 and num_steps 6"),
        ([(6, 8)], "after_step 6 is not"),
        ([(4, 8), (2, 8)], "after_step 2 is not between 4"),
        ([(3, 8)], "no multiple of save_every_steps 2"),
        ([(2, 0)], r"longer_responses\.max_response_tokens"),
        ([(2, 7)], "max_response_tokens 7 after step 2 is below 8, the longest response before"),
        ([(2, 16), (4, 12)], "max_response_tokens 12 after step 4 is below 16"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(
    schedule: list[tuple[int, int]], said: str, replaced: Replaced
) -> None:
    with pytest.raises(SettingsError, match=said):
        longer = tuple(LongerResponses(after_step=at, max_response_tokens=tokens) for at, tokens in schedule)
        replaced(num_steps=6, save_every_steps=2, max_response_tokens=8, longer_responses=longer)


@pytest.mark.parametrize("stage", [-1, 0, 1, 3, 4])
def test_a_zero_stage_that_a_run_cannot_have_is_refused(stage: int, replaced: Replaced) -> None:
    fits = stage in (1, 3)
    with contextlib.nullcontext() if fits else pytest.raises(SettingsError, match=f"zero_stage {stage} is none of"):
        replaced(zero_stage=stage)


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"max_response_tokens": 36}, True),
        ({"max_response_tokens": 37}, False),
        ({"max_prompt_tokens": 85}, False),
        ({"longer_responses": (LongerResponses(after_step=1, max_response_tokens=37),)}, False),
        ({"longer_responses": (LongerResponses(after_step=1, max_response_tokens=36),)}, True),
    ],
)
def test_a_pass_holds_the_longest_sample_of_all_stages(fields: dict[str, Any], fits: bool, replaced: Replaced) -> None:
    refused = pytest.raises(SettingsError, match="may have 101 tokens, and a pass has max_tokens_per_gpu 100")
    with contextlib.nullcontext() if fits else refused:
        replaced(max_tokens_per_gpu=100, **fields)


def test_a_run_leaves_the_model_its_descent_and_its_metrics(config: RLConfig, use: Use) -> None:
    lineage.write(config.model, Lineage(name="branch", kind="export", weights_sha256="x"))
    use(FakeEngine([step(1), "noise", step(2)]))
    (folder,) = run_all([config])
    assert folder == config.output / "hf"
    assert rundir.is_done(config.output) and rundir.is_done(folder)
    assert (folder / "model.safetensors").read_bytes() == b"better"
    assert (folder / "generation_config.json").read_text() == (config.model / "generation_config.json").read_text()
    link = lineage.read(folder)
    assert [each.name for each in link.chain()] == ["branch", "test-rl"]
    assert (link.kind, link.step, link.tokens) == ("rl", 2, 2 * 16 * 10)
    assert link.weights_sha256 == rundir.sha256_folder(folder, "*.safetensors")
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["rl/updates"] for row in rows] == [2, 4]
    assert all(row["rl/accuracy"] == 0.5 and row["time_s"] >= 0 for row in rows)
    assert "noise" in (config.output / "log/openrlhf.log").read_text()


def test_a_finished_run_is_skipped_and_others_are_refused_its_folder(
    config: RLConfig, use: Use, replaced: Replaced
) -> None:
    engine = use(FakeEngine([step(1), step(2)]))
    run_all([config])
    before = snapshot(config.output)
    assert run_all([config]) == [config.output / "hf"]
    assert engine.runs == 1
    with pytest.raises(BadInput, match="learning_rate"):
        run_all([replaced(learning_rate=1.0)])
    assert snapshot(config.output) == before


def stale_at(bad: int, runs: int) -> Callable[[int, int], str]:
    """Lines of an engine that has old weights at step `bad`, in its first `runs` runs."""
    return lambda number, run: step(number, vllm_kl=-0.09 if number == bad and run < runs else 1e-4)


def test_stale_weights_stop_a_run_and_its_saves_stay(replaced: Replaced, use: Use) -> None:
    config = replaced(num_steps=4)
    use(SavingEngine(stale_at(3, runs=1)))
    with pytest.raises(
        StoppedByWatch, match=r"step 3: vllm_kl is -0.09.*old weights.*save from before step 3 is of step 2"
    ):
        run_all([config])
    assert not rundir.is_done(config.output) and not (config.output / "hf").exists()
    assert saves.checkpoints(config.output) == saves.copies(config.output) == [1, 2]
    engine = SavingEngine()
    use(engine)
    run_all([config])
    assert engine.stages == [(2, "16")]


def test_a_step_without_numbers_stops_a_run_before_it_is_saved(config: RLConfig, use: Use) -> None:
    use(SavingEngine(lambda number, _: step(number, vllm_kl=float("nan"), actor_grad_norm=float("inf"))))
    with pytest.raises(
        OctoError, match="step 1: rl/vllm_kl, optim/grad_norm: no finite number; no save is from before"
    ):
        run_all([config])
    assert saves.checkpoints(config.output) == []


def test_a_step_at_fault_that_openrlhf_saved_while_it_was_ended_is_not_gone_on_from(
    replaced: Replaced, use: Use
) -> None:
    class Late(SavingEngine):
        def run(self, arguments: Sequence[str], on_line: Callable[[str], None], until: Callable[[], bool]) -> bool:
            lines: list[str] = []
            super().run(arguments, lines.append, lambda: False)
            for line in lines:
                on_line(line)
            return True

    config = replaced(num_steps=4)
    use(Late(lambda number, _: step(number, policy_loss=float("nan") if number == 3 else 0.0)))
    with pytest.raises(OctoError, match=r"step 3: rl/policy_loss: no finite number; the last save .* is of step 2"):
        run_all([config])
    assert saves.checkpoints(config.output) == [1, 2] and saves.last(config.output) == 2


def test_a_gpu_s_kernels_may_differ_more(config: RLConfig, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeEngine([step(1), step(2, vllm_kl=0.01)]))
    monkeypatch.setattr(run, "has_gpu", lambda: True)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 1)
    run_all([config])
    assert rundir.is_done(config.output)


def test_a_run_rolls_back_to_the_save_before_the_trouble_and_draws_other_samples(
    replaced: Replaced, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    config = replaced(num_steps=4, keep_last_saves=3, watch=RLWatchConfig(on_stale_weights="roll_back"))
    engine = SavingEngine(stale_at(3, runs=1))
    use(engine)
    run_all([config])
    assert engine.stages == [(0, "16"), (2, "16")]
    assert engine.seeds == ["42", "43"]
    assert "rolled back to step 2" in caplog.text
    assert [(back["step"], back["to"]) for back in rundir.read_json(config.output / "roll_backs.json")] == [(3, 2)]
    rows = collect.read_metrics(config.output / "metrics.jsonl")
    assert [(row["step"], row["rl/vllm_kl"]) for row in rows] == [(number, 1e-4) for number in (1, 2, 3, 4)]
    assert rundir.is_done(config.output)


def test_roll_backs_are_bounded_and_counted_across_restarts(replaced: Replaced, use: Use) -> None:
    config = replaced(num_steps=4, watch=RLWatchConfig(on_stale_weights="roll_back", most_roll_backs=2))
    engine = SavingEngine(stale_at(3, runs=9))
    use(engine)
    for runs in (3, 4):
        with pytest.raises(OctoError, match="after 2 roll backs; the last save from before step 3 is of step 2"):
            run_all([config])
        assert len(engine.stages) == runs
    assert engine.seeds == ["42", "43", "44", "44"]


def test_a_run_that_was_stopped_goes_on_with_another_policy(replaced: Replaced, use: Use) -> None:
    config = replaced(num_steps=4)
    use(SavingEngine(stale_at(3, runs=1)))
    with pytest.raises(OctoError):
        run_all([config])
    engine = SavingEngine(stale_at(3, runs=1))
    use(engine)
    run_all([replace(config, watch=RLWatchConfig(on_stale_weights="log"))])
    assert engine.stages == [(2, "16")] and rundir.is_done(config.output)


def test_a_first_save_that_a_job_has_no_time_for_is_said_once_and_a_rerun_may_save_more_often(
    replaced: Replaced, use: Use, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replaced(num_steps=20, save_every_steps=10)
    seconds = {"timing/step_total": 60.0}
    lines = [step(1, **{"timing/step_total": 600.0}), *(step(number, **seconds) for number in range(2, 5))]
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 8.5 * 60))
    use(FakeEngine(lines, failure="killed"))
    with pytest.raises(OctoError, match="killed"):
        run_all([config])
    assert "will be lost" not in caplog.text
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 5 * 60))
    with pytest.raises(OctoError, match="killed"):
        run_all([config])
    assert "the first save of this start, of step 10, is 8m00s away, and this job's time is up in" in caplog.text
    assert caplog.text.count("will be lost") == 1
    engine = SavingEngine(lambda number, run: step(number, **seconds))
    use(engine)
    run_all([replace(config, save_every_steps=5)])
    assert rundir.is_done(config.output)


def test_our_numbers_are_in_tensorboard_and_a_roll_back_purges_them(replaced: Replaced, use: Use) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replaced(num_steps=3, watch=RLWatchConfig(on_stale_weights="roll_back"))
    use(SavingEngine(stale_at(3, runs=1)))
    run_all([config])
    events = EventAccumulator(str(config.output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("rl/vllm_kl")] == [2, 4, 6], "updates, as in the paper's figures"
    assert [event.value for event in events.Scalars("rl/step")] == [1, 2, 3]
    assert "rl/updates" not in events.Tags()["scalars"]
    assert [event.value for event in events.Scalars("rl/vllm_kl")] == pytest.approx([1e-4] * 3)


def test_failed_rewards_are_reported(config: RLConfig, use: Use, caplog: pytest.LogCaptureFixture) -> None:
    use(FakeEngine([step(1, reward_error=0.25), step(2)]))
    run_all([config])
    assert "step 1: 25.0% of the rewards failed" in caplog.text


def test_a_failure_shows_its_cause_and_the_log(config: RLConfig, use: Use) -> None:
    lines = [step(1), "Traceback (most recent call last):", "ValueError: no such head", "INFO shutdown complete"]
    use(FakeEngine(lines, failure="RayTaskError"))
    with pytest.raises(OctoError) as failed:
        run_all([config])
    assert "RayTaskError" in failed.value.what and "ValueError: no such head" in failed.value.what
    assert "shutdown complete" not in failed.value.what
    assert str(config.output / "log/openrlhf.log") in failed.value.fix


def test_steps_that_were_not_reported_fail_the_run(config: RLConfig, use: Use) -> None:
    use(FakeEngine([step(1)]))
    with pytest.raises(VerificationError, match="reported 1 steps instead of 2"):
        run_all([config])


def checkpoint(config: RLConfig, number: int, *, latest: bool) -> Path:
    folder = config.output / "openrlhf/_actor" / f"global_step{number}"
    folder.mkdir(parents=True)
    if latest:
        (folder.parent / "latest").write_text(folder.name)
    return folder


def test_a_killed_run_goes_on_after_its_last_whole_checkpoint(config: RLConfig, use: Use) -> None:
    use(FakeEngine([step(1, acc=0.1), step(2, acc=0.2)], failure="killed"))
    with pytest.raises(OctoError):
        run_all([config])
    whole, torn = checkpoint(config, 1, latest=True), checkpoint(config, 2, latest=False)
    shutil.rmtree(config.output / "log")
    use(FakeEngine([step(2, acc=0.9)]))
    run_all([config])
    assert whole.exists() and not torn.exists()
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["rl/accuracy"]) for row in rows] == [(1, 0.1), (2, 0.9)]
    assert rows[0]["time_s"] <= rows[1]["time_s"]


def test_a_step_whose_line_was_lost_has_its_updates_too(
    config: RLConfig, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "read_events", lambda folder: {1: {"step": 1, "rl/accuracy": 0.9}})
    use(FakeEngine([step(2)]))
    run_all([config])
    rows = collect.read_metrics(config.output / "metrics.jsonl")
    assert [(row["step"], row["rl/updates"]) for row in rows] == [(1, 2), (2, 4)]


def test_a_step_has_the_bound_that_the_watch_held_it_to(replaced: Replaced, use: Use) -> None:
    config = replaced(num_steps=2)
    use(SavingEngine(lambda number, run: step(number)))
    run_all([config])
    assert {row["rl/most_vllm_kl"] for row in collect.read_metrics(config.output / "metrics.jsonl")} == {1e-3}
    other = replaced(num_steps=2, output=config.output.with_name("other"), watch=RLWatchConfig(most_vllm_kl=0.5))
    run_all([other])
    assert {row["rl/most_vllm_kl"] for row in collect.read_metrics(other.output / "metrics.jsonl")} == {0.5}


def test_a_run_killed_in_its_first_save_starts_over(config: RLConfig, use: Use) -> None:
    rundir.write_json(config.output / "config.json", to_dict(config))
    torn = checkpoint(config, 1, latest=False)
    use(FakeEngine([step(1), step(2)]))
    run_all([config])
    assert not torn.exists()


def test_bad_input_is_refused_before_anything_is_written(
    config: RLConfig, use: Use, replaced: Replaced, tmp_path: Path
) -> None:
    engine = use(FakeEngine([]))
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match="is not one step"):
        run_all([config, replaced(output=tmp_path / "other", prompts_per_step=32)])
    assert snapshot(tmp_path) == before and engine.runs == 0


def test_an_error_is_shown_without_routine_lines() -> None:
    lines = [
        "(PolicyModelActor pid=7) Traceback (most recent call last):",
        "(PolicyModelActor pid=7) RuntimeError: out of memory",
        "Train epoch [1/1]: 100%|#| 9/9 [00:01<00:00, 5.1it/s]",
        "INFO core_client: shutdown",
        "",
    ]
    assert meaningful(lines) == ["Traceback (most recent call last):", "RuntimeError: out of memory"]
    assert meaningful(["one", "INFO x", "two"]) == ["one", "two"]


def test_the_first_error_is_shown_with_what_led_to_it_and_the_last_without() -> None:
    lines = [
        "(Rollout pid=7) (EngineCore pid=9) ERROR 11-22 17:21:02 [core.py:1376]     step()",
        "(Rollout pid=7) (EngineCore pid=9) ERROR 11-22 17:21:02 [core.py:1376] RuntimeError: head_dim=16",
        "(Rollout pid=7) the engine is dead",
        "ray.exceptions.RayTaskError(EngineDeadError): see above",
    ]
    shown = [
        "    step()",
        "RuntimeError: head_dim=16",
        "...",
        "ray.exceptions.RayTaskError(EngineDeadError): see above",
    ]
    assert meaningful(lines) == shown
