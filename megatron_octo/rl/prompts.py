"""The prompts of an RL run: read, put into a template, checked, and cut to exactly what its steps use.

OpenRLHF has no number of steps: it goes through its prompt file a number of times, shuffled each time. So each run gets
a file of its own that holds whole steps, and a number of passes. Validation's problems are all asked each time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_octo import rundir
from megatron_octo.config.rl import SET_AS_TEXT, RLConfig, ValidationSet
from megatron_octo.data.read import input_files, pieces, record_name, records
from megatron_octo.data.templates import BadRecord, look_up
from megatron_octo.errors import BadInput
from megatron_octo.grading import extract_answer
from megatron_octo.rl.agent import VALIDATION
from megatron_octo.rl.decontaminate import NUM_WORDS, Overlaps, is_too_short

REPORT = "prompts.json"
# The paper's, after its public rl_dataset.py; none ends in a space or begins with a beginning-of-text token.
TEMPLATES = {
    "none": "{}",
    "simple": "Question:\n{}\nAnswer:\n",
    "user_assistant": "User:\n{}\nAssistant:\n",
    "complex": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "User: You must put your answer inside \\boxed{{}} and Your final answer will be extracted automatically by "
        "the \\boxed{{}} tag.\n{}\nAssistant:"
    ),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a run's prompt file."""

    input: str
    """The prompt, template applied."""
    label: str
    """The right answer; empty in a record without one, which no run asks."""


@dataclass(frozen=True, slots=True)
class ValidationPrompt:
    """One line of a run's validation file."""

    input: str
    """The prompt, template applied."""
    label: dict[str, str]
    """The right answer, marked as validation's."""
    datasource: str
    """Its set; OpenRLHF counts each by itself."""


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Which prompts a run uses, and how often."""

    prompts: tuple[Prompt, ...]
    """Whole steps; where they are all the run's, some are there again."""
    num_episodes: int
    """Passes over them."""
    validation: tuple[ValidationPrompt, ...] = ()
    """Asked at every validation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptReport:
    """What became of the problems of a file."""

    distinct: int
    unanswered: int
    too_long: int
    contaminated: tuple[dict[str, str], ...]
    """Of each: the problem, the evaluation set, and the words that they share."""
    too_short: int
    """Compared with evaluation sets in vain: they have fewer words than are to be shared. They stay."""
    validation: int = 0
    validation_unanswered: int = 0
    validation_too_long: int = 0

    def describe(self, config: RLConfig) -> str:
        """A line for the log."""
        left = self.distinct - self.unanswered - self.too_long - len(self.contaminated)
        compared = f", {self.too_short:,} of them with fewer than {NUM_WORDS} words, too few to share"
        asked = (
            f"; for validation {self.validation:,}, without {self.validation_unanswered:,} whose answer is blank and "
            f"{self.validation_too_long:,} longer than {config.validation.max_prompt_tokens} tokens"
        )
        return (
            f"{self.distinct:,} distinct prompts in {config.prompts}; left out: {self.unanswered:,} whose answer is "
            f"blank, {self.too_long:,} longer than {config.max_prompt_tokens} tokens, {len(self.contaminated):,} that "
            f"share words with evaluation sets; {left:,} remain{compared if config.decontaminate_against else ''}"
            f"{asked if config.validation.sets else ''}"
        )


def choose_prompts(config: RLConfig) -> tuple[PromptPlan, PromptReport]:
    """The prompts of the run, in their order, and what was left out. Reads the files and the model's tokenizer.

    Raises:
        BadInput: see `read_prompts`, `plan_prompts`, `read_validation`; or nothing is left of a validation set.
    """
    found = read_prompts(config, config.template)
    overlaps = Overlaps.read(config.decontaminate_against)
    answered = [prompt for prompt in found if prompt.label]
    problems = {prompt: _problem(prompt, TEMPLATES[config.template]) for prompt in answered}
    contaminated = {prompt: hit for prompt, text in problems.items() if (hit := overlaps.find(text)) is not None}
    clean = [prompt for prompt in answered if prompt not in contaminated]
    short = _short(clean, config.model, config.max_prompt_tokens)
    asked = read_validation(config)
    answered_asked = [each for each in asked if each.label[VALIDATION]]
    short_asked = _short(answered_asked, config.model, config.validation.max_prompt_tokens)
    unasked = {each.name for each in config.validation.sets} - {each.datasource for each in short_asked}
    if unasked:
        raise BadInput(
            f"no problem of the validation sets {', '.join(sorted(unasked))} has an answer and at most "
            f"{config.validation.max_prompt_tokens} tokens",
            fix="raise validation.max_prompt_tokens, or leave them out",
        )
    report = PromptReport(
        distinct=len(found),
        unanswered=len(found) - len(answered),
        too_long=len(clean) - len(short),
        contaminated=tuple({"prompt": each.input, **asdict(hit)} for each, hit in contaminated.items()),
        too_short=sum(is_too_short(problems[each]) for each in short),
        validation=len(short_asked),
        validation_unanswered=len(asked) - len(answered_asked),
        validation_too_long=len(answered_asked) - len(short_asked),
    )
    return replace(plan_prompts(short, config), validation=tuple(short_asked)), report


def read_validation(config: RLConfig) -> list[ValidationPrompt]:
    """The problems of all validation sets.

    Raises:
        BadInput: see `read_prompts`; or two sets share a prompt.
    """
    owners: dict[str, str] = {}
    found = []
    for each in config.validation.sets:
        for prompt in read_prompts(each, config.template):
            if owners.setdefault(prompt.input, each.name) != each.name:
                raise BadInput(
                    f"validation sets {owners[prompt.input]} and {each.name} share the prompt {prompt.input[:60]!r}: "
                    "OpenRLHF would count it in one of them only",
                    fix="take it out of one of them",
                )
            found.append(ValidationPrompt(prompt.input, {VALIDATION: prompt.label}, each.name))
    return found


def read_prompts(source: RLConfig | ValidationSet, template: str) -> list[Prompt]:
    """The distinct prompts of `source.prompts`, in its order; where an answer is blank, so is the label.

    Raises:
        BadInput: a file is missing or damaged, a record lacks its problem or its answer, or a problem occurs with two
            answers.
    """
    labels: dict[str, str] = {}
    for prompt, where in _prompts(source, TEMPLATES[template]):
        if labels.setdefault(prompt.input, prompt.label) != prompt.label:
            raise BadInput(
                f"{where}: the prompt {prompt.input[:60]!r} has two labels, {labels[prompt.input]!r} and "
                f"{prompt.label!r}",
                fix="keep one of the records",
            )
    return [Prompt(text, label) for text, label in labels.items()]


def _prompts(source: RLConfig | ValidationSet, template: str) -> Iterator[tuple[Prompt, str]]:
    for file in input_files(source.prompts):
        for piece in pieces(file):
            for number, record in records(piece):
                where = f"{file}, {record_name(file)} {number}"
                yield Prompt(template.format(_question(record, source, where)), _label(record, source, where)), where


def _question(record: object, source: RLConfig | ValidationSet, where: str) -> str:
    question = _field(record, source.question_column, source, where)
    if not isinstance(question, str) or not question.strip():
        raise BadInput(
            f"{where}: {source.question_column} is {question!r}, not a text",
            fix=f"correct the record, or name another column ({_naming(source)})",
        )
    return question


def _label(record: object, source: RLConfig | ValidationSet, where: str) -> str:
    """The right answer; empty where the record leaves it blank, as two of MATH8K do."""
    answer = _field(record, source.answer_column, source, where)
    if isinstance(answer, str) and not answer.strip():
        return ""
    text = str(answer) if isinstance(answer, int | float | str) and not isinstance(answer, bool) else ""
    label = text.rpartition("####")[2] if "####" in text else extract_answer(text) or text
    if not label.strip():
        raise BadInput(
            f"{where}: {source.answer_column} is {answer!r}, not an answer",
            fix=f"correct the record, or name another column ({_naming(source)})",
        )
    return label.strip()


def _field(record: object, column: str, source: RLConfig | ValidationSet, where: str) -> object:
    fix = f"each record has a problem and an answer, whose columns are to be named: {_naming(source)}"
    if isinstance(record, BadRecord):
        raise BadInput(f"{where}: {record}", fix=fix)
    try:
        return look_up(record, column)
    except BadRecord as error:
        raise BadInput(f"{where}: {error}", fix=fix) from None


def _naming(source: RLConfig | ValidationSet) -> str:
    """How a command line names the columns."""
    if isinstance(source, ValidationSet):
        return f"--validation.sets {SET_AS_TEXT}"
    return "--question-column and --answer-column"


def _problem(prompt: Prompt, template: str) -> str:
    """A prompt without its template, which an evaluation set may have as well."""
    before, after = template.format("\0").split("\0")
    return prompt.input.removeprefix(before).removesuffix(after)


def _short[P: (Prompt, ValidationPrompt)](prompts: Sequence[P], model: Path, most_tokens: int) -> list[P]:
    """Those of at most so many tokens of the model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([prompt.input for prompt in prompts], add_special_tokens=False)
    return [prompt for prompt, each in zip(prompts, encoded, strict=True) if len(each.ids) <= most_tokens]


def plan_prompts(prompts: Sequence[Prompt], config: RLConfig) -> PromptPlan:
    """Choose the prompts of `num_steps` steps by the seed: each as often as any other, or once more.

    OpenRLHF shuffles each pass. So passes of whole steps stay passes; otherwise the file is the whole run's, and a step
    may have a problem twice, as two groups of samples.

    Raises:
        BadInput: there are too few prompts for one step.
    """
    shuffled = random.Random(config.seed).sample(list(prompts), len(prompts))
    each = config.prompts_per_step
    if len(shuffled) < each:
        raise BadInput(
            f"{len(shuffled):,} usable prompts in {config.prompts} / prompts_per_step {each} is not one step",
            fix="give more prompts, or lower prompts_per_step, or raise max_prompt_tokens",
        )
    passes, rest = divmod(config.num_steps * each, len(shuffled))
    if rest or len(shuffled) % each:
        return PromptPlan(tuple(shuffled * passes + shuffled[:rest]), num_episodes=1)
    return PromptPlan(tuple(shuffled), num_episodes=passes)


def write_prompts(path: Path, prompts: Sequence[Prompt | ValidationPrompt]) -> None:
    """Write prompts as JSON lines."""
    rundir.write_atomic(path, "".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts))
