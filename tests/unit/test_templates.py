"""Records become texts to the letter, or are rejected."""

from __future__ import annotations

import pytest

from megatron_octo.data.templates import BadRecord, column_names, renderer

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
    rendered = renderer(template)(record)
    assert rendered is not None
    assert rendered.text == text


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
    with pytest.raises(BadRecord):
        renderer(template)(record)


@pytest.mark.parametrize(
    ("template", "record", "answers"),
    [
        ("text", {"text": "a"}, []),
        ("question_answer", {"question": "Q?", "answer": "A."}, ["A."]),
        ("long_cot", {"question": "Q?", "thinking": "t", "answer": "A."}, ["<think>\nt\n</think>\nA."]),
        ("chat", {"messages": [*TURNS, *TURNS]}, ["Ho", "Ho"]),
    ],
)
def test_answers_are_where_they_stand_in_the_text(template, record, answers):
    rendered = renderer(template)(record)
    assert [rendered.text[start:end] for start, end in rendered.answers] == answers


def test_columns_may_have_other_names_and_lie_inside_of_others():
    render = renderer("question_answer", columns=(("question", "meta.problem"), ("answer", "generations.1")))
    record = {"meta": {"problem": "Q?"}, "generations": ["a", "b"]}
    assert render(record).text == "Q?\nb"
    with pytest.raises(BadRecord, match=r"no column 'generations\.1'"):
        render({**record, "generations": ["a"]})
    assert renderer("text", columns=(("text", "a.b"),))({"a.b": "x"}).text == "x"


def test_a_format_string_takes_columns_and_keeps_doubled_braces():
    render = renderer("format", format_string="{problem}\n{{{answer}}}")
    assert render({"problem": "P", "answer": "7"}).text == "P\n{7}"
    with pytest.raises(BadRecord, match="no column 'answer'"):
        render({"problem": "P"})


def test_conversations_of_other_models_are_left_out():
    render = renderer("chat", chat_models=("gpt-4",))
    assert render({"messages": TURNS, "model": "gpt-4-0314"}).text == "User:Hi\nAssistant:Ho"
    assert render({"messages": TURNS, "model": "gpt-3.5-turbo"}) is None
    with pytest.raises(BadRecord, match="no column 'model'"):
        render({"messages": TURNS})


def test_turns_of_other_make_are_read():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert (
        renderer("chat", columns=(("messages", "conversation"),))({"conversation": turns}).text
        == "User:Hi\nAssistant:Ho"
    )


def test_the_columns_that_a_table_must_have():
    assert column_names("chat", chat_models=True) == ["messages", "model"]
    assert column_names("question_answer", columns=(("answer", "generations.0"),)) == ["question", "generations"]
    assert column_names("format", format_string="{a.b}{c}{c}") == ["a", "c"]
