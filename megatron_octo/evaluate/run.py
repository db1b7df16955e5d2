"""Score models on a problem set: sample answers, grade them, write scores with intervals.

Reads Hugging Face folders and JSON lines of problems; writes one folder a model (samples.jsonl,
scores.json, config.json, DONE). A model whose folder is DONE is skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_octo import console, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.evaluate import EvaluateConfig, ScoredModel
from megatron_octo.data.tokenizer import check_vocabulary
from megatron_octo.errors import BadInput
from megatron_octo.evaluate import generate
from megatron_octo.evaluate.generate import Answer
from megatron_octo.evaluate.statistics import accuracy_interval
from megatron_octo.grading import extract_answer, is_correct

SAMPLES, SCORES = "samples.jsonl", "scores.json"

log = console.logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A prompt and its right answer."""

    input: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """One line of samples.jsonl."""

    problem: int
    sample: int
    response: str
    answer: str | None
    """The final answer in `response`, None where it gives none."""
    label: str
    correct: bool
    tokens: int
    truncated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What scores.json holds. Shares are of all answers, 0 to 1."""

    task: str
    model: str
    num_problems: int
    samples_per_problem: int
    temperature: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    """95%, problems as clusters."""
    boxed_share: float
    """Answers that give a final answer at all."""
    mean_tokens: float
    """Length of an answer, its end-of-text id included."""
    truncated_share: float
    """Answers cut off at max_new_tokens."""
    per_problem: tuple[float, ...]
    """Share right of each problem's answers, in the order of the problem file."""
    problems_sha256: str
    weights_sha256: str


def evaluate(config: EvaluateConfig, *, overwrite: bool = False) -> list[Scores]:
    """Score each model that has no scores yet; returns the scores of all, in the order of `config.models`.

    Raises:
        BadInput: problems or a model are missing or malformed, or a folder holds scores of other
            settings, weights or problems and `overwrite` is not set. Nothing is written then.
    """
    problems = read_problems(config.problems)
    pending = check(config, overwrite=overwrite)
    for scored in config.models:
        if scored not in pending:
            log.info("%s: scores are done, skipped", scored.output)
    if pending:
        generate.prepare([scored.model for scored in pending])
        prompts = [problem.input for problem in problems]
        ids = [generate.prompt_ids(each.model, prompts, max_new_tokens=config.max_new_tokens) for each in pending]
        for scored, model_prompts in zip(pending, ids, strict=True):
            _score(config, scored, problems, model_prompts)
    return [read_scores(scored.output) for scored in config.models]


def check(config: EvaluateConfig, *, overwrite: bool = False) -> list[ScoredModel]:
    """The models that are still to be scored. Changes nothing.

    Raises:
        BadInput: as `evaluate`.
    """
    for scored in config.models:
        if not (scored.model / "config.json").is_file():
            raise BadInput(
                f"no model in {scored.model}: it has no config.json",
                fix="give a Hugging Face folder; `octo convert to-hf` writes one",
            )
        if not any(scored.model.glob("*.safetensors")):
            raise BadInput(f"no weights in {scored.model}: it has no *.safetensors", fix="export the model again")
        check_vocabulary(scored.model)
    outputs = [scored.output for scored in config.models]
    twice = next((output for output in outputs if outputs.count(output) > 1), None)
    if twice is not None:
        raise BadInput(f"two models would write their scores to {twice}", fix="give each a folder of its own")
    return [scored for scored in config.models if not _is_scored(config, scored, overwrite=overwrite)]


def read_problems(path: Path) -> list[Problem]:
    """The problems in a file of JSON lines.

    Raises:
        BadInput: the file is missing or empty, or a line is not an object with the texts `input` and `label`.
    """
    if not path.is_file():
        raise BadInput(f"no problem file {path}", fix="check the path, or run the stage that writes it")
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}:{number} is not JSON: {error}", fix="correct the line") from None
        for field in ("input", "label"):
            if not isinstance(record, dict) or not isinstance(record.get(field), str) or not record[field]:
                raise BadInput(
                    f"{path}:{number} has no text in {field!r}",
                    fix='a line reads {"input": "the prompt", "label": "the answer"}',
                )
        problems.append(Problem(input=record["input"], label=record["label"]))
    if not problems:
        raise BadInput(f"{path} holds no problems", fix="give a file with at least one line")
    return problems


def read_scores(folder: Path) -> Scores:
    """The scores that `evaluate` wrote into `folder`.

    Raises:
        BadInput: there are none.
    """
    value = rundir.read_json(folder / SCORES)
    value["accuracy_interval"] = tuple(value["accuracy_interval"])
    value["per_problem"] = tuple(value["per_problem"])
    return Scores(**value)


def score(graded: Sequence[Graded], *, config: EvaluateConfig, model: Path, problems: int) -> Scores:
    """Count graded answers. `graded` holds `samples_per_problem` of each of the `problems` problems."""
    right = [0] * problems
    for each in graded:
        right[each.problem] += each.correct
    per_problem = tuple(count / config.samples_per_problem for count in right)
    return Scores(
        task=config.task,
        model=str(model),
        num_problems=problems,
        samples_per_problem=config.samples_per_problem,
        temperature=config.temperature,
        accuracy=sum(right) / len(graded),
        accuracy_interval=accuracy_interval(per_problem, seed=config.seed),
        boxed_share=sum(each.answer is not None for each in graded) / len(graded),
        mean_tokens=sum(each.tokens for each in graded) / len(graded),
        truncated_share=sum(each.truncated for each in graded) / len(graded),
        per_problem=per_problem,
        problems_sha256=rundir.sha256(config.problems),
        weights_sha256=_weights_sha256(model),
    )


def _score(config: EvaluateConfig, scored: ScoredModel, problems: list[Problem], prompts: list[list[int]]) -> None:
    """Sample, grade and write one model's folder."""
    started = time.monotonic()
    total = len(problems) * config.samples_per_problem
    found = generate.answers(
        scored.model,
        prompts,
        samples=config.samples_per_problem,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    graded = [
        grade(answer, problems[answer.problem])
        for answer in console.progress(found, total=total, title=f"{config.task}: {scored.model}")
    ]
    if len(graded) != total:
        raise RuntimeError(f"vLLM returned {len(graded)} answers, not {total}")
    graded.sort(key=lambda each: (each.problem, each.sample))
    scores = score(graded, config=config, model=scored.model, problems=len(problems))
    with rundir.new_folder(scored.output) as folder:
        rundir.write_atomic(folder / SAMPLES, "".join(json.dumps(asdict(each)) + "\n" for each in graded))
        rundir.write_json(folder / SCORES, asdict(scores))
        rundir.write_json(folder / "config.json", _own_config(config, scored))
    log.info(
        "%s: %s %.1f%% [%.1f, %.1f] of %d answers right, %.1f tokens an answer, %s",
        scored.model,
        config.task,
        100 * scores.accuracy,
        100 * scores.accuracy_interval[0],
        100 * scores.accuracy_interval[1],
        total,
        scores.mean_tokens,
        console.duration(time.monotonic() - started),
    )


def grade(answer: Answer, problem: Problem) -> Graded:
    """An answer with its mark."""
    return Graded(
        problem=answer.problem,
        sample=answer.sample,
        response=answer.response,
        answer=extract_answer(answer.response),
        label=problem.label,
        correct=is_correct(answer.response, problem.label),
        tokens=answer.tokens,
        truncated=answer.truncated,
    )


def _own_config(config: EvaluateConfig, scored: ScoredModel) -> dict[str, Any]:
    """The settings of one model's scores: an EvaluateConfig of that model alone."""
    return to_dict(replace(config, models=(scored,)))


def _is_scored(config: EvaluateConfig, scored: ScoredModel, *, overwrite: bool) -> bool:
    """Whether the output holds whole scores to keep; refuses those of other settings, weights or problems."""
    if overwrite and (scored.output / SCORES).is_file():
        return False
    if not rundir.is_written(scored.output, _own_config(config, scored)):
        return False
    old = read_scores(scored.output)
    for what, then, now in (
        ("weights", old.weights_sha256, _weights_sha256(scored.model)),
        ("problems", old.problems_sha256, rundir.sha256(config.problems)),
    ):
        if then != now:
            raise BadInput(
                f"the scores in {scored.output} are of other {what}: SHA-256 {then[:12]} then, {now[:12]} now",
                fix="--overwrite to score again, or another output folder",
            )
    return True


def _weights_sha256(model: Path) -> str:
    return rundir.sha256_folder(model, "*.safetensors")
