"""The prompts of an RL run: read, checked, and cut to exactly what its steps use.

OpenRLHF has no number of steps: it goes through its prompt file a number of times. So each run gets
a file of its own that holds whole steps, and a number of passes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_octo import rundir
from megatron_octo.config.rl import RLConfig
from megatron_octo.errors import BadInput


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file."""

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


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct prompts of a file of JSON lines, in its order.

    Raises:
        BadInput: the file is missing, or a line is not `{"input": "...", "label": "..."}`, or a prompt
            occurs with two labels.
    """
    if not path.is_file():
        raise BadInput(f"no prompt file {path}", fix="run the stage that writes it, or correct `prompts`")
    labels: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        prompt = _parse(line, f"{path}, line {number}")
        if labels.setdefault(prompt.input, prompt.label) != prompt.label:
            raise BadInput(
                f"{path}, line {number}: the prompt {prompt.input[:60]!r} has two labels, "
                f"{labels[prompt.input]!r} and {prompt.label!r}",
                fix="keep one of the lines",
            )
    return [Prompt(text, label) for text, label in labels.items()]


def _parse(line: str, where: str) -> Prompt:
    fix = 'each line is {"input": "...", "label": "..."}, both of them text and not empty'
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is not JSON: {error}", fix=fix) from None
    fields = [value.get(key) if isinstance(value, dict) else None for key in ("input", "label")]
    if not all(isinstance(field, str) and field.strip() for field in fields):
        raise BadInput(f"{where} lacks `input` or `label`: {line[:80]}", fix=fix)
    return Prompt(*fields)  # type: ignore[arg-type]


def check_prompts(prompts: Sequence[Prompt], config: RLConfig) -> None:
    """Refuse prompts that OpenRLHF would change without an error.

    Raises:
        BadInput: a prompt is longer than `max_prompt_tokens` (it would be cut from the left), or the
            model's tokenizer does not give its text back (the reward could not tell prompt and response apart).
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(config.model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([prompt.input for prompt in prompts], add_special_tokens=False)
    ids = [each.ids for each in encoded]
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    if len(ids[longest]) > config.max_prompt_tokens:
        too_long = sum(len(each) > config.max_prompt_tokens for each in ids)
        raise BadInput(
            f"{too_long:,} of {len(ids):,} prompts in {config.prompts} are longer than max_prompt_tokens "
            f"{config.max_prompt_tokens}; the longest has {len(ids[longest])} tokens and begins "
            f"{prompts[longest].input[:60]!r}",
            fix=f"raise max_prompt_tokens to {len(ids[longest])}, or drop those prompts",
        )
    for prompt, text in zip(prompts, tokenizer.decode_batch(ids, skip_special_tokens=False), strict=True):
        if prompt.input not in text:
            raise BadInput(
                f"the tokenizer in {config.model} gives the prompt {prompt.input[:60]!r} back as {text[:60]!r}",
                fix="use a tokenizer that keeps every character, or change the prompt",
            )


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
    counted = f"{len(shuffled):,} distinct prompts in {config.prompts} / prompts_per_step {each}"
    if steps_a_pass == 0:
        raise BadInput(f"{counted} is not one step", fix="give more prompts or lower prompts_per_step")
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
