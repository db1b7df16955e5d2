"""The prompts of an RL run: read, put into a template, checked, and cut to exactly what its steps use.

OpenRLHF has no number of steps: it goes through its prompt file a number of times. So each run gets
a file of its own that holds whole steps, and a number of passes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_octo import rundir
from megatron_octo.config.rl import RLConfig
from megatron_octo.data.read import input_files, pieces, record_name, records
from megatron_octo.data.templates import BadRecord, look_up
from megatron_octo.errors import BadInput
from megatron_octo.grading import extract_answer
from megatron_octo.rl.decontaminate import Overlaps

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
    """The right answer."""


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Which prompts a run uses, and how often."""

    prompts: tuple[Prompt, ...]
    """Whole steps."""
    num_episodes: int
    """Passes over them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptReport:
    """What became of the problems of a file."""

    distinct: int
    too_long: int
    contaminated: tuple[dict[str, str], ...]
    """Of each: the problem, the evaluation set, and the words that they share."""

    def describe(self, config: RLConfig) -> str:
        """A line for the log."""
        left = self.distinct - self.too_long - len(self.contaminated)
        return (
            f"{self.distinct:,} distinct prompts in {config.prompts}; left out: {self.too_long:,} longer than "
            f"{config.max_prompt_tokens} tokens, {len(self.contaminated):,} that share words with evaluation sets; "
            f"{left:,} remain"
        )


def choose_prompts(config: RLConfig) -> tuple[PromptPlan, PromptReport]:
    """The prompts of the run, in their order, and what was left out. Reads the files and the model's tokenizer.

    Raises:
        BadInput: see `read_prompts`, `plan_prompts`; or the tokenizer does not give a prompt back.
    """
    found = read_prompts(config)
    overlaps = Overlaps.read(config.decontaminate_against)
    contaminated = {prompt: hit for prompt in found if (hit := overlaps.find(prompt.input)) is not None}
    clean = [prompt for prompt in found if prompt not in contaminated]
    short = _short_prompts(clean, config)
    report = PromptReport(
        distinct=len(found),
        too_long=len(clean) - len(short),
        contaminated=tuple({"prompt": each.input, **asdict(hit)} for each, hit in contaminated.items()),
    )
    return plan_prompts(short, config), report


def read_prompts(config: RLConfig) -> list[Prompt]:
    """The distinct prompts of `config.prompts`, in its order.

    Raises:
        BadInput: a file is missing or damaged, a record lacks its problem or its answer, or a problem occurs with two
            answers.
    """
    labels: dict[str, str] = {}
    for prompt, where in _prompts(config):
        if labels.setdefault(prompt.input, prompt.label) != prompt.label:
            raise BadInput(
                f"{where}: the prompt {prompt.input[:60]!r} has two labels, {labels[prompt.input]!r} and "
                f"{prompt.label!r}",
                fix="keep one of the records",
            )
    return [Prompt(text, label) for text, label in labels.items()]


def _prompts(config: RLConfig) -> Iterator[tuple[Prompt, str]]:
    template = TEMPLATES[config.template]
    for file in input_files(config.prompts):
        for piece in pieces(file):
            for number, record in records(piece):
                where = f"{file}, {record_name(file)} {number}"
                yield Prompt(template.format(_question(record, config, where)), _label(record, config, where)), where


def _question(record: object, config: RLConfig, where: str) -> str:
    question = _field(record, config.question_column, where)
    if not isinstance(question, str) or not question.strip():
        raise BadInput(
            f"{where}: {config.question_column} is {question!r}, not a text",
            fix="correct the record, or name another column (--question-column)",
        )
    return question


def _label(record: object, config: RLConfig, where: str) -> str:
    answer = _field(record, config.answer_column, where)
    text = str(answer) if isinstance(answer, int | float | str) and not isinstance(answer, bool) else ""
    label = text.rpartition("####")[2] if "####" in text else extract_answer(text) or text
    if not label.strip():
        raise BadInput(
            f"{where}: {config.answer_column} is {answer!r}, not an answer",
            fix="correct the record, or name another column (--answer-column)",
        )
    return label.strip()


def _field(record: object, column: str, where: str) -> object:
    fix = "each record has a problem and an answer: --question-column and --answer-column name their columns"
    if isinstance(record, BadRecord):
        raise BadInput(f"{where}: {record}", fix=fix)
    try:
        return look_up(record, column)
    except BadRecord as error:
        raise BadInput(f"{where}: {error}", fix=fix) from None


def _short_prompts(prompts: Sequence[Prompt], config: RLConfig) -> list[Prompt]:
    """Those of at most `max_prompt_tokens`.

    Raises:
        BadInput: the model's tokenizer does not give a text back: the reward could not tell prompt and response apart.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(config.model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([prompt.input for prompt in prompts], add_special_tokens=False)
    ids = [each.ids for each in encoded]
    for prompt, text in zip(prompts, tokenizer.decode_batch(ids, skip_special_tokens=False), strict=True):
        if prompt.input not in text:
            raise BadInput(
                f"the tokenizer in {config.model} gives the prompt {prompt.input[:60]!r} back as {text[:60]!r}",
                fix="use a tokenizer that keeps every character, or change the prompt",
            )
    return [prompt for prompt, each in zip(prompts, ids, strict=True) if len(each) <= config.max_prompt_tokens]


def plan_prompts(prompts: Sequence[Prompt], config: RLConfig) -> PromptPlan:
    """Choose the prompts of `num_steps` steps, in an order drawn from the seed.

    Raises:
        BadInput: there are too few prompts for one pass and the steps are not whole passes.
    """
    shuffled = random.Random(config.seed).sample(list(prompts), len(prompts))
    each, steps = config.prompts_per_step, config.num_steps
    steps_a_pass = len(shuffled) // each
    if steps_a_pass >= steps:
        return PromptPlan(tuple(shuffled[: steps * each]), num_episodes=1)
    counted = f"{len(shuffled):,} usable prompts in {config.prompts} / prompts_per_step {each}"
    if steps_a_pass == 0:
        raise BadInput(
            f"{counted} is not one step",
            fix="give more prompts, or lower prompts_per_step, or raise max_prompt_tokens",
        )
    passes, rest = divmod(steps, steps_a_pass)
    if rest:
        raise BadInput(
            f"{counted} = {steps_a_pass} steps a pass; num_steps {steps} is {passes} passes and {rest} steps",
            fix=f"num_steps {max(1, passes) * steps_a_pass} or {(passes + 1) * steps_a_pass}, "
            f"or a file of {steps * each:,} prompts",
        )
    return PromptPlan(tuple(shuffled[: steps_a_pass * each]), num_episodes=passes)


def write_prompts(path: Path, plan: PromptPlan) -> None:
    """Write the chosen prompts as JSON lines."""
    rundir.write_atomic(path, "".join(json.dumps(asdict(prompt)) + "\n" for prompt in plan.prompts))
