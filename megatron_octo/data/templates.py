"""How a record becomes one text. The line breaks are part of the recipe: RL prompts repeat them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_octo.config.data import Template

ROLES = {"user": "User", "assistant": "Assistant", "system": "System"}


def render(template: Template, record: Any) -> str | None:
    """The text of a record, or None for a record that does not fit the template or has nothing to say."""
    try:
        text = _TEMPLATES[template](record)
        text.encode()  # half of a surrogate pair is no text
    except (LookupError, TypeError, AttributeError, UnicodeEncodeError):
        return None
    return text if text.strip() else None


def _text(record: Any) -> str:
    return _string(record["text"])


def _question_answer(record: Any) -> str:
    return f"{_string(record['question'])}\n{_string(record['answer'])}"


def _long_cot(record: Any) -> str:
    question, thinking, answer = (_string(record[field]) for field in ("question", "thinking", "answer"))
    return f"{question}\n<think>\n{thinking}\n</think>\n{answer}"


def _chat(record: Any) -> str:
    return "\n".join(f"{ROLES[turn['role']]}:{_string(turn['content'])}" for turn in record["messages"])


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


_TEMPLATES: dict[Template, Callable[[Any], str]] = {
    "text": _text,
    "question_answer": _question_answer,
    "long_cot": _long_cot,
    "chat": _chat,
}
