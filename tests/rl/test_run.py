"""A run around OpenRLHF, with OpenRLHF left out: checks, following, resuming, finishing."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_octo import lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.rl import LongerResponses, RLConfig
from megatron_octo.errors import BadInput, OctoError, SettingsError, VerificationError
from megatron_octo.lineage import Lineage
from megatron_octo.rl import collect, run
from megatron_octo.rl.cluster import RunFailed, meaningful
from megatron_octo.rl.run import check_model, run_all, run_rl
from tests.conftest import snapshot

Replaced = Callable[..., RLConfig]
SHAPE = {"max_position_embeddings": 128, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 384}


def step(number: int, **values: float) -> str:
    reported = {"acc": 0.5, "vllm_kl": 1e-4, "rollout/reward_mean": 0.0, "rollout/response_length_mean": 10.0, **values}
    return f"(PPOTrainer pid=1) INFO ppo_trainer.py:551] Global step {number}: {reported}"


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
        monkeypatch.setattr(run, "check_command", lambda arguments: None)
        monkeypatch.setattr(run, "has_gpu", lambda: False)
        return engine

    return install


class StagedEngine(FakeEngine):
    """Goes on from the last checkpoint, saves each step, and is stopped where it is asked to."""

    def __init__(self) -> None:
        super().__init__([])
        self.stages: list[tuple[int, str]] = []

    def run(self, arguments: Sequence[str], on_line: Callable[[str], None], until: Callable[[], bool]) -> bool:
        flags = dict(itertools.pairwise(arguments))
        actor = Path(flags["--ckpt.path"]) / "_actor"
        done = int((actor / "latest").read_text().removeprefix("global_step")) if (actor / "latest").exists() else 0
        self.stages.append((done, flags["--rollout.max_new_tokens"]))
        for number in range(done + 1, 4):
            on_line(step(number))
            (actor / f"global_step{number}").mkdir(parents=True)
            (actor / "latest").write_text(f"global_step{number}")
            if until():
                return False
        return super().run(arguments, on_line, until)


SCHEDULE = (
    LongerResponses(after_step=1, max_response_tokens=20),
    LongerResponses(after_step=2, max_response_tokens=24),
)


def test_a_length_schedule_is_a_chain_of_runs_that_go_on_from_each_other(
    replaced: Replaced, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, opened = StagedEngine(), []
    use(engine)
    clusters = run.cluster
    monkeypatch.setattr(run, "cluster", lambda **options: opened.append(1) or clusters(**options))
    config = replaced(num_steps=3, longer_responses=SCHEDULE)
    run_rl(config)
    assert engine.stages == [(0, "16"), (1, "20"), (2, "24")]
    assert len(opened) == 3, "what ran beyond a border must be gone before the next stage"
    assert [row["step"] for row in collect.read_metrics(config.output / "metrics.jsonl")] == [1, 2, 3]
    assert rundir.is_done(config.output)


def test_a_run_killed_in_its_second_stage_goes_on_in_it(replaced: Replaced, use: Use) -> None:
    engine, config = StagedEngine(), replaced(num_steps=3, longer_responses=SCHEDULE[:1])
    actor = config.output / "openrlhf" / "_actor"
    (actor / "global_step2").mkdir(parents=True)
    (actor / "latest").write_text("global_step2")
    use(engine)
    with pytest.raises(
        VerificationError, match="reported 1 steps instead of 3"
    ):  # the metrics went with the killed run
        run_rl(config)
    assert engine.stages == [(2, "20")]


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ([(0, 8)], "after_step 0 is not between 0 and num_steps 6"),
        ([(6, 8)], "after_step 6 is not"),
        ([(4, 8), (2, 8)], "after_step 2 is not between 4"),
        ([(3, 8)], "no multiple of save_every_steps 2"),
        ([(2, 0)], r"longer_responses\.max_response_tokens"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(
    schedule: list[tuple[int, int]], said: str, replaced: Replaced
) -> None:
    with pytest.raises(SettingsError, match=said):
        longer = tuple(LongerResponses(after_step=at, max_response_tokens=tokens) for at, tokens in schedule)
        replaced(num_steps=6, save_every_steps=2, longer_responses=longer)


def test_a_run_leaves_the_model_its_descent_and_its_metrics(config: RLConfig, use: Use) -> None:
    lineage.write(config.model, Lineage(name="branch", kind="export", weights_sha256="x"))
    use(FakeEngine([step(1), "noise", step(2)]))
    folder = run_rl(config)
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


def test_stale_weights_stop_a_run_on_the_cpu(config: RLConfig, use: Use) -> None:
    use(FakeEngine([step(1), step(2, vllm_kl=-0.09)]))
    with pytest.raises(VerificationError, match=r"step 2: vllm_kl is -0.09.*old weights"):
        run_rl(config)
    assert not rundir.is_done(config.output) and not (config.output / "hf").exists()


def test_a_step_without_vllm_kl_stops_a_run_on_the_cpu(config: RLConfig, use: Use) -> None:
    use(FakeEngine([step(1, vllm_kl=float("nan"))]))
    with pytest.raises(VerificationError, match="vllm_kl is None"):
        run_rl(config)


def test_on_a_gpu_a_large_vllm_kl_is_a_warning(
    config: RLConfig, use: Use, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(FakeEngine([step(1), step(2, vllm_kl=0.01)]))
    monkeypatch.setattr(run, "has_gpu", lambda: True)
    run_rl(config)
    assert "vllm_kl is 0.01" in caplog.text


def test_failed_rewards_are_reported(config: RLConfig, use: Use, caplog: pytest.LogCaptureFixture) -> None:
    use(FakeEngine([step(1, reward_error=0.25), step(2)]))
    run_rl(config)
    assert "step 1: 25.0% of the rewards failed" in caplog.text


def test_a_failure_shows_its_cause_and_the_log(config: RLConfig, use: Use) -> None:
    lines = [step(1), "Traceback (most recent call last):", "ValueError: no such head", "INFO shutdown complete"]
    use(FakeEngine(lines, failure="RayTaskError"))
    with pytest.raises(OctoError) as failed:
        run_rl(config)
    assert "RayTaskError" in failed.value.what and "ValueError: no such head" in failed.value.what
    assert "shutdown complete" not in failed.value.what
    assert str(config.output / "log/openrlhf.log") in failed.value.fix


def test_steps_that_were_not_reported_fail_the_run(config: RLConfig, use: Use) -> None:
    use(FakeEngine([step(1)]))
    with pytest.raises(VerificationError, match="reported 1 steps instead of 2"):
        run_rl(config)


def checkpoint(config: RLConfig, number: int, *, latest: bool) -> Path:
    folder = config.output / "openrlhf/_actor" / f"global_step{number}"
    folder.mkdir(parents=True)
    if latest:
        (folder.parent / "latest").write_text(folder.name)
    return folder


def test_a_killed_run_goes_on_after_its_last_whole_checkpoint(config: RLConfig, use: Use) -> None:
    use(FakeEngine([step(1, acc=0.1), step(2, acc=0.2)], failure="killed"))
    with pytest.raises(OctoError):
        run_rl(config)
    whole, torn = checkpoint(config, 1, latest=True), checkpoint(config, 2, latest=False)
    shutil.rmtree(config.output / "log")
    use(FakeEngine([step(2, acc=0.9)]))
    run_rl(config)
    assert whole.exists() and not torn.exists()
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["rl/accuracy"]) for row in rows] == [(1, 0.1), (2, 0.9)]
    assert rows[0]["time_s"] <= rows[1]["time_s"]


def test_a_run_killed_in_its_first_save_starts_over(config: RLConfig, use: Use) -> None:
    rundir.write_json(config.output / "config.json", to_dict(config))
    torn = checkpoint(config, 1, latest=False)
    use(FakeEngine([step(1), step(2)]))
    run_rl(config)
    assert not torn.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", None, r"lacks \*\.safetensors"),
        ("tokenizer.json", None, "lacks tokenizer.json"),
        ("generation_config.json", None, "lacks generation_config.json"),
        ("generation_config.json", "{}", "no eos_token_id"),
        ("config.json", json.dumps({**SHAPE, "num_attention_heads": 4}), "heads of 16 .* vLLM on a CPU takes 32"),
        (
            "config.json",
            json.dumps({**SHAPE, "max_position_embeddings": 79}),
            r"64 \+ max_response_tokens 16 = 80 is beyond .* 79",
        ),
    ],
)
def test_an_unfit_model_folder_is_refused(config: RLConfig, name: str, content: str | None, said: str) -> None:
    check_model(config, cuda=False)
    if content is None:
        (config.model / name).unlink()
    else:
        (config.model / name).write_text(content)
    with pytest.raises(BadInput, match=said):
        check_model(config, cuda=False)


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
