"""Scoring without vLLM: made-up answers go through the same grading, counting and writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.config.base import read_settings
from megatron_octo.config.evaluate import EvaluateConfig, ScoredModel
from megatron_octo.errors import BadInput
from megatron_octo.evaluate import generate
from megatron_octo.evaluate.generate import Answer, answer_seed
from megatron_octo.evaluate.run import check, evaluate, read_problems, read_scores
from megatron_octo.platform import vllm_cpu
from megatron_octo.rundir import is_done
from tests.conftest import snapshot, write_model_folder

RIGHT = {(0, 0), (0, 1), (1, 0)}  # (problem, sample)
LABELS = ("5", "7", "9")


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """Three problems, two answers each, one model."""
    model = tmp_path / "model"
    model.mkdir()
    write_model_folder(model)
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"input": f"Find {n}.", "label": n}) + "\n" for n in LABELS))
    return EvaluateConfig(
        task="sums",
        problems=problems,
        models=(ScoredModel(model=model, output=tmp_path / "run" / "scores" / "sums"),),
        samples_per_problem=2,
        temperature=1.0,
        max_new_tokens=8,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of vLLM: right answers where RIGHT says so. Holds the settings of each call."""
    calls: list[dict[str, Any]] = []

    def answers(model: Path, prompts: Sequence[Sequence[int]], **settings: Any) -> Iterator[Answer]:
        calls.append({"model": model, "prompts": len(prompts), **settings})
        for problem in reversed(range(len(prompts))):  # vLLM returns them in no order
            for sample in range(settings["samples"]):
                number = LABELS[problem] if (problem, sample) in RIGHT else "1000"
                box = f"It is \\boxed{{{number}}}." if (problem, sample) != (2, 1) else "No idea."
                yield Answer(problem=problem, sample=sample, response=box, tokens=4 + problem, truncated=problem == 2)

    monkeypatch.setattr(generate, "answers", answers)
    monkeypatch.setattr(generate, "prepare", lambda models: None)
    monkeypatch.setattr(generate, "prompt_ids", lambda model, prompts, max_new_tokens: [[1] for _ in prompts])
    return calls


def test_scores_count_what_the_answers_say(config: EvaluateConfig, asked: list[dict[str, Any]]) -> None:
    (scores,) = evaluate(config)
    assert scores.accuracy == pytest.approx(3 / 6)
    assert scores.per_problem == (1.0, 0.5, 0.0)
    assert scores.boxed_share == pytest.approx(5 / 6)
    assert scores.mean_tokens == pytest.approx(5.0)
    assert scores.truncated_share == pytest.approx(2 / 6)
    assert scores.accuracy_interval[0] <= scores.accuracy <= scores.accuracy_interval[1]
    assert (scores.num_problems, scores.samples_per_problem, scores.temperature) == (3, 2, 1.0)
    assert asked == [
        {
            "model": config.models[0].model,
            "prompts": 3,
            "samples": 2,
            "temperature": 1.0,
            "max_new_tokens": 8,
            "seed": 0,
        }
    ]


def test_folder_holds_samples_in_order_scores_and_settings(config: EvaluateConfig, asked: list[dict[str, Any]]) -> None:
    (scores,) = evaluate(config)
    folder = config.models[0].output
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(each["problem"], each["sample"]) for each in samples] == [(p, s) for p in range(3) for s in range(2)]
    assert samples[3] == {
        "problem": 1,
        "sample": 1,
        "response": "It is \\boxed{1000}.",
        "answer": "1000",
        "label": "7",
        "correct": False,
        "tokens": 5,
        "truncated": False,
    }
    assert samples[5]["answer"] is None
    assert read_scores(folder) == scores
    assert read_settings(EvaluateConfig, folder / "config.json") == config
    assert is_done(folder)


def test_scored_model_is_skipped_and_a_new_one_is_not(config: EvaluateConfig, asked: list[dict[str, Any]]) -> None:
    first = evaluate(config)
    other = ScoredModel(model=config.models[0].model, output=config.problems.parent / "other")
    both = evaluate(replace(config, models=(*config.models, other)))
    assert len(asked) == 2
    assert both[0] == first[0]
    assert is_done(other.output)


def test_failure_leaves_no_folder(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    def breaks(*args: object, **settings: object) -> Iterator[Answer]:
        yield Answer(problem=0, sample=0, response="", tokens=1, truncated=False)
        raise RuntimeError("engine died")

    monkeypatch.setattr(generate, "answers", breaks)
    with pytest.raises(RuntimeError, match="engine died"):
        evaluate(config)
    assert not config.models[0].output.exists()


def test_answers_that_are_missing_are_noticed(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    one = Answer(problem=0, sample=0, response="", tokens=1, truncated=False)
    monkeypatch.setattr(generate, "answers", lambda *args, **settings: iter([one]))
    with pytest.raises(RuntimeError, match="1 answers, not 6"):
        evaluate(config)


def test_other_settings_weights_or_problems_are_refused_until_overwrite(
    config: EvaluateConfig, asked: list[dict[str, Any]]
) -> None:
    evaluate(config)
    folder, weights = config.models[0].output, config.models[0].model / "model.safetensors"
    before = snapshot(folder)
    with pytest.raises(BadInput, match="max_new_tokens: 8 in the folder, 9 asked for"):
        evaluate(replace(config, max_new_tokens=9))
    weights.write_bytes(b"other weights")
    with pytest.raises(BadInput, match="are of other weights"):
        evaluate(config)
    weights.write_bytes(b"weights")
    config.problems.write_text(config.problems.read_text().replace("Find 9", "Say 9"))
    with pytest.raises(BadInput, match="are of other problems"):
        evaluate(config)
    assert snapshot(folder) == before
    evaluate(config, overwrite=True)
    assert len(asked) == 2
    assert snapshot(folder) != before


def test_overwrite_spares_a_folder_of_something_else(config: EvaluateConfig, asked: list[dict[str, Any]]) -> None:
    folder = config.models[0].output
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="no finished stage wrote it"):
        evaluate(config, overwrite=True)
    assert (folder / "thesis.txt").exists()
    assert asked == []


def test_missing_model_or_weights_are_refused(config: EvaluateConfig) -> None:
    (config.models[0].model / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="no weights in"):
        check(config)
    (config.models[0].model / "config.json").unlink()
    with pytest.raises(BadInput, match="no model in"):
        check(config)


def test_two_models_with_one_output_are_refused(config: EvaluateConfig) -> None:
    with pytest.raises(BadInput, match="two models would write"):
        check(replace(config, models=config.models * 2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"p\.jsonl:2 is not JSON"),
        ("[]", r"p\.jsonl:2 has no text in 'input'"),
        ('{"input": "x", "label": 5}', r"p\.jsonl:2 has no text in 'label'"),
        ('{"input": "", "label": "5"}', r"p\.jsonl:2 has no text in 'input'"),
    ],
)
def test_malformed_problem_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"input": "x", "label": "5"}}\n{line}\n')
    with pytest.raises(BadInput, match=message):
        read_problems(path)


def test_missing_or_empty_problem_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no problem file"):
        read_problems(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="holds no problems"):
        read_problems(tmp_path / "p.jsonl")


def test_every_answer_has_a_seed_of_its_own() -> None:
    seeds = {answer_seed(seed, problem, sample) for seed in range(4) for problem in range(100) for sample in range(8)}
    assert len(seeds) == 3200
    assert answer_seed(0, 1, 2) == answer_seed(0, 1, 2)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The process's environment, an empty one."""
    values: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", values)
    return values


def test_cpu_build_runs_in_this_process_and_keeps_what_the_user_set(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_cpu, "is_cpu_build", lambda: True)
    environment["HF_HUB_OFFLINE"] = "0"
    vllm_cpu.prepare(weights_bytes=2**30, verbose=False)
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
    assert "OMP_NUM_THREADS" not in environment


def test_gpu_build_gets_none_of_the_cpu_settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_cpu, "is_cpu_build", lambda: False)
    vllm_cpu.prepare(weights_bytes=1, verbose=True)
    assert not set(environment) & {*vllm_cpu.CPU, "OMP_NUM_THREADS"}
    assert environment["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
