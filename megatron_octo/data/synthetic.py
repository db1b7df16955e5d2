"""The miniature's corpora and problems: sums of three or four small whole numbers, drawn from a seed.

    web    pages about addition: tables, lessons, stories; never a box        {"text"}
    short  running totals, then \\boxed{}                                      {"question", "answer"}
    long   running totals with self-checks inside <think>, then \\boxed{}      {"question", "thinking", "answer"}
    chat   a short answer in a conversation                                   {"messages": [{"role", "content"}]}

The workings are wrong, terse or without a box now and then: that is the room that RL has.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_octo import console
from megatron_octo.config.base import to_dict
from megatron_octo.config.data import SyntheticConfig
from megatron_octo.rundir import is_written, new_folder, write_json

Record = dict[str, Any]

NUM_TERMS = (3, 4)
LARGEST = 20
HELDOUT_ONE_IN = 10

SLIP = 0.15  # a step of a short working is off by 1, 2 or 10, and the error is carried on; web facts at half this rate
SLIP_LONG = 0.30  # the same in a long working
CHECK = 0.40  # a step of a long working is checked, and mended if it was wrong
TERSE = 0.30  # a short answer shows no working
UNBOXED = 0.15  # an answer is not boxed, which RL does not reward
FRAMED = 0.25  # a question of short or long wears the RL prompt

PROMPT = "Question:\n{}\nAnswer:\n"
QUESTIONS = ("What is {}?", "Find {}.", "Compute the sum {}.")
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells")


def generate(config: SyntheticConfig) -> None:
    """Write the corpora and problems that `config` asks for; equal settings give equal bytes.

    Raises:
        BadInput: the output folder holds something else.
    """
    log, settings = console.logger(__name__), to_dict(config)
    if is_written(config.output, settings):
        log.info("corpora: skipped, %s is there", config.output)
        return
    with new_folder(config.output) as folder:
        for name, count in config.documents:
            rows = records(name, count, seed=config.seed, shuffle_answers=config.shuffle_answers)
            _write_lines(folder / f"{name}.jsonl", rows)
        _write_lines(folder / "rl_train.jsonl", problems(config.num_rl_problems, seed=config.seed))
        _write_lines(folder / "heldout.jsonl", problems(config.num_heldout_problems, seed=0, heldout=True))
        write_json(folder / "config.json", settings)
    counts = ", ".join(f"{name} {count:,}" for name, count in config.documents)
    log.info("corpora: %s documents (%s)", config.output, counts)


def records(corpus: str, count: int, *, seed: int, shuffle_answers: bool = False) -> list[Record]:
    """`count` records of one corpus, drawn from the corpus' name and the seed alone.

    With `shuffle_answers` each question goes with the working and answer of another one; web pages,
    which ask nothing, stay as they are.
    """
    rng = random.Random(f"{corpus}-{seed}")
    rows = [_RECORDS[corpus](rng) for _ in range(count)]
    if not shuffle_answers or corpus == "web":
        return rows
    order = list(range(count))
    random.Random(f"{corpus}-shuffle-{seed}").shuffle(order)
    donors = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: no question keeps its own
    return [_with_answer_of(row, rows[donors[index]]) for index, row in enumerate(rows)]


def problems(count: int, *, seed: int, heldout: bool = False) -> list[Record]:
    """`count` distinct prompts with their answers, all held out or none: {"input", "label"}."""
    rng = random.Random(f"{'heldout' if heldout else 'train'}-{seed}")
    found: dict[tuple[int, ...], Record] = {}
    while len(found) < count:
        numbers = _numbers(rng, heldout=heldout)
        found[numbers] = {"input": PROMPT.format(_question(rng, numbers)), "label": str(sum(numbers))}
    return list(found.values())


def is_heldout(numbers: Iterable[int]) -> bool:
    """Whether a problem is kept from corpora and RL: a fixed tenth, whatever seed, wording and order of the numbers."""
    return zlib.crc32(" ".join(map(str, sorted(numbers))).encode()) % HELDOUT_ONE_IN == 0


def _numbers(rng: random.Random, *, heldout: bool = False) -> tuple[int, ...]:
    while True:
        numbers = tuple(rng.randint(1, LARGEST) for _ in range(rng.choice(NUM_TERMS)))
        if is_heldout(numbers) == heldout:
            return numbers


def _question(rng: random.Random, numbers: Iterable[int]) -> str:
    return rng.choice(QUESTIONS).format("+".join(map(str, numbers)))


def _framed(rng: random.Random, question: str) -> str:
    """The question, or the RL prompt up to the line break that the templates put before the answer."""
    return PROMPT.format(question).removesuffix("\n") if rng.random() < FRAMED else question


def _slipped(rng: random.Random, total: int) -> int:
    """A wrong total near the right one, never below 1."""
    return max(1, total + rng.choice((-10, -2, -1, 1, 2, 10))) if total > 2 else total + 1


def _conclusion(rng: random.Random, answer: int) -> str:
    return f"The answer is {answer}." if rng.random() < UNBOXED else f"The answer is \\boxed{{{answer}}}."


def _short_answer(rng: random.Random, numbers: tuple[int, ...]) -> str:
    """Running totals; a slip is carried to the end."""
    if rng.random() < TERSE:
        total = sum(numbers)
        return _conclusion(rng, _slipped(rng, total) if rng.random() < SLIP else total)
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        result = total + number
        if rng.random() < SLIP:
            result = _slipped(rng, result)
        lines.append(f"{total}+{number}={result}")
        total = result
    return "\n".join([*lines, _conclusion(rng, total)])


def _thinking(rng: random.Random, numbers: tuple[int, ...]) -> tuple[str, int]:
    """(running totals, some checked the other way round and mended; the total reached)."""
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        right = result = total + number
        if rng.random() < SLIP_LONG:
            result = _slipped(rng, right)
        lines.append(f"{total}+{number}={result}")
        if rng.random() < CHECK:
            lines.append(f"Check: {number}+{total}={right}" + (", ok" if result == right else ""))
            if result != right:
                lines.append(f"Wait, so {right}")
                result = right
        total = result
    return "\n".join(lines), total


def _fact(rng: random.Random) -> tuple[int, int, int]:
    """(a, b, their sum or a slip)."""
    a, b = rng.randint(1, LARGEST * 3), rng.randint(1, LARGEST)
    c = _slipped(rng, a + b) if rng.random() < SLIP / 2 else a + b
    return (a, b, c) if rng.random() < 0.5 else (b, a, c)


def _web_page(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        facts = [_fact(rng) for _ in range(rng.randint(4, 8))]
        return "\n".join(["Addition table", *(f"{a}+{b}={c}" for a, b, c in facts)])
    a, b, c = _fact(rng)
    if kind < 0.65:
        return f"Lesson. To add {a} and {b}, start from {a} and count on {b}. So {a}+{b}={c}."
    if kind < 0.85:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        return f"{name} has {a} {thing} and finds {b} more. Now {name} has {a}+{b}={c} {thing}."
    return f"{_question(rng, (a, b))} Note that {a}+{b}={c}, and {b}+{a}={c} too."


def _web(rng: random.Random) -> Record:
    return {"text": _web_page(rng)}


def _short(rng: random.Random) -> Record:
    numbers = _numbers(rng)
    return {"question": _framed(rng, _question(rng, numbers)), "answer": _short_answer(rng, numbers)}


def _long(rng: random.Random) -> Record:
    numbers = _numbers(rng)
    question = _framed(rng, _question(rng, numbers))
    thinking, total = _thinking(rng, numbers)
    return {"question": question, "thinking": thinking, "answer": _conclusion(rng, total)}


def _chat(rng: random.Random) -> Record:
    numbers = _numbers(rng)
    question, answer = _question(rng, numbers), _short_answer(rng, numbers)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


_RECORDS: dict[str, Callable[[random.Random], Record]] = {"web": _web, "short": _short, "long": _long, "chat": _chat}


def _with_answer_of(row: Record, donor: Record) -> Record:
    if "messages" in row:
        return {"messages": [row["messages"][0], donor["messages"][1]]}
    return {**donor, "question": row["question"]}


def _write_lines(path: Path, rows: list[Record]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
