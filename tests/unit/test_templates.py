"""Records become texts to the letter, or are rejected."""

from __future__ import annotations

import pytest

from megatron_octo.data.templates import render

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    ("template", "record", "text"),
    [
        ("text", {"text": " a\n"}, " a\n"),
        ("question_answer", {"question": "Q?", "answer": "A."}, "Q?\nA."),
        ("question_answer", {"question": "Question:\nQ?\nAnswer:", "answer": "A."}, "Question:\nQ?\nAnswer:\nA."),
        ("long_cot", {"question": "Q?", "thinking": "a\nb", "answer": "A."}, "Q?\n<think>\na\nb\n</think>\nA."),
        ("chat", {"messages": TURNS}, "User:Hi\nAssistant:Ho"),
        ("chat", {"messages": [*TURNS, *TURNS]}, "User:Hi\nAssistant:Ho\nUser:Hi\nAssistant:Ho"),
    ],
)
def test_a_record_becomes_this_text(template, record, text):
    assert render(template, record) == text


@pytest.mark.parametrize(
    ("template", "record"),
    [
        ("text", {"body": "a"}),
        ("text", {"text": None}),
        ("text", {"text": 5}),
        ("text", {"text": " \n"}),
        ("text", {"text": "half a pair \ud800"}),
        ("text", ["a"]),
        ("text", None),
        ("text", "a"),
        ("question_answer", {"question": "Q?"}),
        ("long_cot", {"question": "Q?", "answer": "A."}),
        ("chat", {"messages": []}),
        ("chat", {"messages": None}),
        ("chat", {"messages": [{"role": "user"}]}),
        ("chat", {"messages": [{"role": "robot", "content": "Hi"}]}),
        ("chat", {"messages": ["Hi"]}),
        ("chat", {"messages": {"role": "user", "content": "Hi"}}),
    ],
)
def test_a_record_that_does_not_fit_is_rejected(template, record):
    assert render(template, record) is None
