"""How a record becomes one text. The line breaks are part of the recipe: RL prompts repeat them.

text             text
question_answer  question, answer
long_cot         question, thinking, answer
chat             messages: turns with role and content (or from and value), model where `chat_models` asks
format           the columns that its string names, texts or numbers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NamedTuple

from megatron_octo.config.data import Template, parse_choice, parse_format

ROLES = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}
ANSWERING = "Assistant"
FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "question_answer": ("question", "answer"),
    "long_cot": ("question", "thinking", "answer"),
    "chat": ("messages",),
}


class Rendered(NamedTuple):
    """The text of a record."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()
    """Where its answers are: (start, end) in characters, ascending."""


class BadRecord(Exception):
    """A record that cannot become a text; the message says why."""


class _LeftOut(Exception):
    """A record that a filter leaves out."""


Render = Callable[[Any], Rendered | None]
"""A record's text, or None for one that a filter leaves out; raises BadRecord."""
_Shape = Callable[[Any], Rendered]
_Field = Callable[[Any, str], Any]


def renderer(
    template: Template,
    *,
    columns: Sequence[tuple[str, str]] = (),
    format_string: str = "",
    chat_models: Sequence[str] = (),
    keep_empty: bool = False,
) -> Render:
    """The function that turns records into texts; the parameters are PrepareConfig's, but for `keep_empty`: whether a
    text may be empty.
    """
    paths = dict(columns)

    def field(record: Any, name: str) -> Any:
        column = paths.get(name, name)
        choice = parse_choice(column)
        return _chosen(record, *choice) if choice else look_up(record, column)

    if template == "format":
        shape = _format(format_string, field)
    elif template == "chat":
        shape = _chat(field, tuple(chat_models))
    else:
        shape = {"text": _text, "question_answer": _question_answer, "long_cot": _long_cot}[template](field)

    def render(record: Any) -> Rendered | None:
        try:
            rendered = shape(record)
        except _LeftOut:
            return None
        if not keep_empty and not rendered.text.strip():
            raise BadRecord("empty document")
        try:
            rendered.text.encode()
        except UnicodeEncodeError:
            raise BadRecord("half of a surrogate pair, which is no character") from None
        return rendered

    return render


def column_names(
    template: Template, *, columns: Sequence[tuple[str, str]] = (), format_string: str = "", chat_models: bool = False
) -> list[str]:
    """The columns that records must have, as `look_up` takes them."""
    if template == "format":
        fields = [column for _, column in parse_format(format_string) if column]
    else:
        fields = [*FIELDS[template], *(["model"] if chat_models else [])]
    paths = dict(columns)
    named = [paths.get(name, name) for name in fields]
    return list(dict.fromkeys(column for each in named for column in parse_choice(each) or (each,)))


def look_up(record: Any, path: str) -> Any:
    """The value at a column, or inside of one: `generations.0`, `meta.question`.

    Raises:
        BadRecord: there is none.
    """
    value = record
    for part in [path] if isinstance(record, dict) and path in record else path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, TypeError, ValueError):
            raise BadRecord(f"no column {path!r}") from None
    return value


def _chosen(record: Any, values_column: str, flags_column: str) -> Any:
    """The first item of a list whose flag, in the other list, is true."""
    values, flags = look_up(record, values_column), look_up(record, flags_column)
    if flags is None:
        raise _LeftOut
    if not isinstance(values, list) or not isinstance(flags, list) or len(values) != len(flags):
        raise BadRecord(f"{values_column} and {flags_column} are no lists of one length")
    if not {type(flag) for flag in flags} <= {bool, NoneType}:
        raise BadRecord(f"{flags_column} holds something else than true and false")
    if True not in flags:
        raise _LeftOut
    return values[flags.index(True)]


def _text(field: _Field) -> _Shape:
    return lambda record: Rendered(_string(field(record, "text"), "text"))


def _question_answer(field: _Field) -> _Shape:
    def render(record: Any) -> Rendered:
        question, answer = (_string(field(record, name), name) for name in FIELDS["question_answer"])
        return _answered(f"{question}\n", answer)

    return render


def _long_cot(field: _Field) -> _Shape:
    def render(record: Any) -> Rendered:
        question, thinking, answer = (_string(field(record, name), name) for name in FIELDS["long_cot"])
        return _answered(f"{question}\n", f"<think>\n{thinking}\n</think>\n{answer}")

    return render


def _chat(field: _Field, models: tuple[str, ...]) -> _Shape:
    def render(record: Any) -> Rendered:
        if models and not str(field(record, "model")).startswith(models):
            raise _LeftOut
        turns = field(record, "messages")
        if not isinstance(turns, list) or not turns:
            raise BadRecord("messages is no list of turns, or an empty one")
        text, answers = "", []
        for turn in turns:
            role, content = _turn(turn)
            text += f"\n{role}:" if text else f"{role}:"
            if role == ANSWERING:
                answers.append((len(text), len(text) + len(content)))
            text += content
        return Rendered(text, tuple(answers))

    return render


def _turn(turn: Any) -> tuple[str, str]:
    """(User, Assistant or System; what it says)."""
    if not isinstance(turn, dict):
        raise BadRecord("a turn of messages is no object")
    role = ROLES.get(str(turn.get("role", turn.get("from"))))
    if role is None:
        raise BadRecord(f"a turn of messages has the role {turn.get('role', turn.get('from'))!r}")
    return role, _string(turn.get("content", turn.get("value")), "content")


def _format(format_string: str, field: _Field) -> _Shape:
    pieces = parse_format(format_string)

    def render(record: Any) -> Rendered:
        parts = (text + (_printed(field(record, column), column) if column else "") for text, column in pieces)
        return Rendered("".join(parts))

    return render


def _printed(value: Any, name: str) -> str:
    """A text as it is, a number as Python and JSON write it."""
    return str(value) if type(value) in (int, float) and math.isfinite(value) else _string(value, name)


def _answered(question: str, answer: str) -> Rendered:
    return Rendered(question + answer, ((len(question), len(question) + len(answer)),))


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {'missing' if value is None else f'no text but {type(value).__name__}'}")
    return value
