"""OpenRLHF's log lines and TensorBoard files -> metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_octo.rl.board import Board
from megatron_octo.rl.collect import (
    append_metrics,
    fill_gaps,
    joined,
    parse_step,
    parse_validation,
    read_events,
    read_metrics,
    validation,
    write_metrics,
)

LINE = (
    "(PPOTrainer pid=1) INFO 11-22 16:58:22 ppo_trainer.py:551] \u2728 Global step 3: {'acc': 0.25, 'boxed': 0.9, "
    "'vllm_kl': -0.0001, 'actor_grad_norm': nan, 'policy_loss': -inf, 'rollout/reward_mean': -0.5, "
    "'rollout/response_length_mean': 30.5, 'rollout/truncated_rate': 0.0, 'timing/step_total': 3.5, 'kl': 0.0}"
)
VALIDATION = (
    "(PPOTrainer pid=1) INFO 11-22 16:58:23 ppo_trainer.py:598] \u2728 Evaluation completed in 0:00:01, global_step 3, "
    "eval_metrics: {'eval_AMC_23_pass4': 0.5, 'eval_AMC_23_pass1': 0.25, 'eval_AMC_23_response_length_mean': 40.5, "
    "'eval_AMC_23_truncated_rate': 0.125, 'eval_response_length_mean': 7.0, 'eval_num_samples': 160.0}"
)
SCORES = {
    "valid/AMC_23/accuracy": 0.25,
    "valid/AMC_23/response_length_mean": 40.5,
    "valid/AMC_23/truncated_share": 0.125,
}


def write_events(folder: Path, events: list[tuple[int, float, dict[str, float]]], kind: str = "train") -> None:
    """A TensorBoard file with (step, wall time, values)."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step, wall_time, values in events:
        summary = Summary(
            value=[Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
        )
        writer.add_event(Event(step=step, wall_time=wall_time, summary=summary))
    writer.close()


def test_a_step_line_becomes_metrics_under_our_names() -> None:
    row = parse_step(LINE)
    assert row is not None
    assert row["step"] == 3 and isinstance(row["step"], int)
    assert row["rl/accuracy"] == 0.25
    assert row["rl/reward_mean"] == -0.5
    assert row["rl/response_length_mean"] == 30.5
    assert row["rl/truncated_share"] == 0.0
    assert row["rl/vllm_kl"] == -0.0001
    assert not {"optim/grad_norm", "rl/policy_loss"} & set(row)  # not finite
    assert "kl" not in row


def test_a_validation_line_becomes_the_scores_of_its_step() -> None:
    assert parse_validation(VALIDATION) == {"step": 3, **SCORES}
    assert parse_validation(LINE) is None and parse_step(VALIDATION) is None


def test_scores_join_the_row_of_their_step() -> None:
    rows = [{"step": 2, "rl/accuracy": 0.1}, {"step": 3, "rl/accuracy": 0.2}]
    assert joined(rows, {"step": 3, **SCORES}) == [rows[0], {**rows[1], **SCORES}]
    assert joined(rows, {"step": 4, **SCORES}) == rows


def test_scores_are_in_the_event_files_too(tmp_path: Path) -> None:
    write_events(tmp_path / "run", [(3, 1.0, {"acc": 0.5})])
    write_events(tmp_path / "run", [(3, 2.0, {"eval_toy_pass1": 0.75})], kind="eval")
    assert read_events(tmp_path) == {3: {"step": 3, "rl/accuracy": 0.5, "valid/toy/accuracy": 0.75}}


def test_lengths_of_right_and_wrong_responses_come_from_what_all_have() -> None:
    """Three responses of 10, 20 and 60 tokens; the first two are right."""
    means = {"acc": 2 / 3, "right_tokens": (10 + 20) / 3, "rollout/response_length_mean": 30.0}
    row = parse_step(f"Global step 1: {means}")
    assert row is not None and "rl/right_tokens" not in row
    assert row["rl/right_length_mean"] == pytest.approx(15.0)
    assert row["rl/wrong_length_mean"] == pytest.approx(60.0)


@pytest.mark.parametrize(("accuracy", "length"), [(1.0, "rl/right_length_mean"), (0.0, "rl/wrong_length_mean")])
def test_where_all_are_right_or_wrong_there_is_one_length(accuracy: float, length: str) -> None:
    means = {"acc": accuracy, "right_tokens": 30.0 * accuracy, "rollout/response_length_mean": 30.0}
    row = parse_step(f"Global step 1: {means}")
    assert row is not None and {"rl/right_length_mean", "rl/wrong_length_mean"} & set(row) == {length}
    assert row[length] == pytest.approx(30.0)


def test_validation_is_the_mean_over_its_sets() -> None:
    assert validation({"step": 1, "valid/a/accuracy": 0.2, "valid/b/accuracy": 0.6, "rl/accuracy": 1.0}) == 0.4
    assert validation({"step": 1, "rl/accuracy": 1.0, "valid/a/length": 3.0}) is None


@pytest.mark.parametrize(
    "line", ["", "Global step", "Generate samples: 100%|#| 8/8", "Saved best checkpoint: global_step4"]
)
def test_other_lines_are_no_steps(line: str) -> None:
    assert parse_step(line) is None


def test_event_files_give_the_same_names_and_the_later_of_two_attempts(tmp_path: Path) -> None:
    write_events(tmp_path / "run", [(1, 10.0, {"acc": 0.1}), (2, 20.0, {"acc": 0.2, "vllm_kl": 1e-4})])
    write_events(tmp_path / "run", [(2, 40.0, {"acc": 0.5}), (3, 50.0, {"rollout/reward_mean": 1.0, "kl": 3.0})])
    events = read_events(tmp_path)
    assert list(events) == [1, 2, 3]
    assert events[2]["rl/accuracy"] == pytest.approx(0.5)
    assert events[3] == {"step": 3, "rl/reward_mean": 1.0}


def test_our_own_event_files_which_are_over_updates_stand_for_no_rollout_step(tmp_path: Path) -> None:
    write_events(tmp_path / "run", [(1, 10.0, {"acc": 0.1})])
    board = Board(tmp_path, updates_done=0)
    board.add({"step": 1, "rl/updates": 2, "rl/accuracy": 0.1, **SCORES})
    board.close()
    assert read_events(tmp_path) == {1: {"step": 1, "rl/accuracy": pytest.approx(0.1)}}


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [{"step": 1}])
    append_metrics(path, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3, "rl/acc')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_no_metrics_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_steps_whose_line_was_lost_come_from_the_event_files() -> None:
    ours = [{"step": 1, "rl/accuracy": 0.1, "time_s": 5.0}, {"step": 3, "rl/accuracy": 0.3, "time_s": 9.0}]
    events = {step: {"step": step, "rl/accuracy": 0.9} for step in (1, 2)}
    rows = fill_gaps(ours, events, num_steps=4)
    assert [(row["step"], row["rl/accuracy"], row["time_s"]) for row in rows] == [
        (1, 0.1, 5.0),
        (2, 0.9, 5.0),
        (3, 0.3, 9.0),
    ]
