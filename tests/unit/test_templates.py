"""Records become texts to the letter, or are rejected."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.templates import BadRecord, column_names, renderer
from megatron_octo.errors import BadInput

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


def test_a_format_string_takes_numbers_as_they_are_written():
    render = renderer("format", format_string="{a} {b.0}")
    assert render({"a": 118, "b": [0.5]}).text == "118 0.5"
    for value in (True, None, math.nan, [1], {"c": 1}):
        with pytest.raises(BadRecord, match="a is "):
            render({"a": value, "b": ["x"]})


@pytest.mark.parametrize(
    ("format_string", "reason"),
    [
        ("{a", "is broken: expected '}'"),
        ("a}", "is broken: Single '}'"),
        ("{a!r}", r"asks for 'a' in another form \(r\)"),
        ("{a:05d}", r"asks for 'a' in another form \(05d\)"),
        ("{a:{b}}", r"asks for 'a' in another form"),
        ("{}\n{b}", "has braces without a column"),
        ("the same for all", "names no column"),
        ("{a[0]}", r"column 'a\[0\]' is no place in a record"),
    ],
)
def test_a_format_string_that_would_not_do_is_refused_before_anything_is_read(format_string, reason):
    with pytest.raises(BadInput, match=reason) as error:
        config(template="format", format_string=format_string)
    assert error.value.fix


def config(**fields) -> PrepareConfig:
    return PrepareConfig(name="own", input=Path("a.jsonl"), tokenizer=Path("t"), output=Path("o"), **fields)


CHOICE = (("answer", "generations[correct]"),)


def test_the_first_item_whose_flag_is_true_is_chosen():
    render = renderer("question_answer", columns=CHOICE)
    record = {"question": "Q?", "generations": ["a", "b", "c"]}
    assert render({**record, "correct": [False, True, True]}).text == "Q?\nb"
    assert render({**record, "correct": [None, None, True]}).text == "Q?\nc"


@pytest.mark.parametrize("correct", [[False, False], [None, None], None])
def test_a_record_of_which_nothing_is_right_is_left_out(correct):
    assert (
        renderer("question_answer", columns=CHOICE)({"question": "Q?", "generations": ["a", "b"], "correct": correct})
        is None
    )


@pytest.mark.parametrize(
    ("generations", "correct", "reason"),
    [
        (["a", "b"], [True], "of one length"),
        ("a", [True], "of one length"),
        (["a"], "yes", "of one length"),
        (["a", "b"], [False, 1], "something else than true and false"),
        (["a"], ["true"], "something else than true and false"),
        ([None], [True], "answer is missing"),
    ],
)
def test_a_choice_that_cannot_be_made_is_a_bad_record(generations, correct, reason):
    with pytest.raises(BadRecord, match=reason):
        renderer("question_answer", columns=CHOICE)({"question": "Q?", "generations": generations, "correct": correct})


@pytest.mark.parametrize("column", ["generations[0]", "generations[", "a[b]c", "[correct]", "a[b][c]"])
def test_a_column_that_is_no_place_in_a_record_is_refused(column):
    with pytest.raises(BadInput, match="is no place in a record"):
        config(template="text", columns=(("text", column),))


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
    assert column_names("question_answer", columns=(("answer", "generations.0"),)) == ["question", "generations.0"]
    assert column_names("question_answer", columns=CHOICE) == ["question", "generations", "correct"]
    assert column_names("format", format_string="{a.b}{c}{c}") == ["a.b", "c"]
