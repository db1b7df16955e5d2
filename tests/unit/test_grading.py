"""Final answers out of text, and two answers compared."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from megatron_octo.grading import answers_equal, extract_answer, grade, is_correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is \\boxed{33}.", "33"),
        ("7+18=25\nThe answer is \\boxed{ 33 }", "33"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\sqrt{\\frac{a^{2}}{b}}} done", "\\sqrt{\\frac{a^{2}}{b}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\}}", "\\}"),
        ("\\boxed {5}", "5"),
        ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("\\fbox{5}", "5"),
        ("{\\boxed{5}}}}}", "5"),
        ("\\boxed{5} and then \\boxed{6", "5"),
        ("\\boxed{5", None),
        ("\\boxed{}", None),
        ("\\boxed{ \n }", None),
        ("The answer is 5.", None),
        ("boxed{5}", None),
        ("\\boxed 5", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


EQUAL = [
    ("24", "24"),
    ("024", "24"),
    ("24.", "24"),
    ("24.0", "24"),
    ("+24", "24"),
    ("-3", "\u22123"),
    ("$24$", "24"),
    ("\\$24", "24"),
    ("24\\%", "24"),
    ("1,234", "1234"),
    ("12{,}345,678", "12345678"),
    ("1\\,234", "1234"),
    ("1,234.50", "1234.5"),
    ("\\frac{1}{2}", "0.5"),
    ("\\dfrac{1}{2}", "1/2"),
    ("\\frac12", "\\tfrac{2}{4}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    (".5", "1/2"),
    ("5\\text{ cm}", "5"),
    ("5 cm", "5"),
    ("5 cm^2", "5"),
    ("12 square feet", "12"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("x = 5", "5"),
    ("x=5", "x = 5"),
    ("\\text{Yes}", "yes"),
    ("(B)", "\\text{B}"),
    ("\\left(1, 2\\right)", "(1,2)"),
    ("\\boxed{7}", "7"),
    ("\\sqrt2", "\\sqrt{2}"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("x+1", "1+x"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\frac{\\pi}{2}", "\\pi/2"),
    ("\\{1,2,3\\}", "\\{3,2,1\\}"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_answers_that_mean_the_same_are_equal(answer: str, reference: str) -> None:
    assert answers_equal(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("24", "25"),
        ("24", "42"),
        ("-24", "24"),
        ("0.33", "1/3"),
        ("1/0", "0"),
        ("1,23", "123"),
        ("12,34", "1234"),
        ("5x", "5"),
        ("x", "5"),
        ("5 \\pi", "5"),
        ("x+1", "x-1"),
        ("(1,2)", "(2,1)"),
        ("\\sqrt{2}", "1.41"),
        ("A", "B"),
        ("", "24"),
        ("24", ""),
        ("cm", "5"),
    ],
)
def test_answers_that_differ_are_not_equal(answer: str, reference: str) -> None:
    assert not answers_equal(answer, reference)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "{" * 50_000 + "\\boxed{5",
        "\\boxed{" + "(" * 5_000 + "}",
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{10^{100000000}}",
        "\\boxed{99999999!}",
        "\\boxed{" + "9" * 10_000 + "}",
        "\\boxed{\\frac{}{}}",
        "\\boxed{\\frac{1}}",
        "\\boxed{\\int_{0}^{}}",
        "\\boxed{__import__('os').abort()}",
        "\\boxed{\x00\ud800}",
        "\\boxed{\\input{/etc/passwd}}",
        "\\boxed{1e400}",
        "\\boxed{{{}}}",
    ],
)
def test_hostile_text_is_wrong_and_soon(text: str) -> None:
    began = time.process_time()
    assert not is_correct(text, "5")
    assert time.process_time() - began < 5


def test_a_response_without_a_box_is_wrong_even_if_it_says_the_answer() -> None:
    assert not is_correct("The answer is 5.", "5")


def test_only_the_last_box_counts() -> None:
    assert is_correct("\\boxed{4}? no: \\boxed{5}", "5")
    assert not is_correct("\\boxed{5}? no: \\boxed{4}", "5")


def test_a_grade_says_when_the_comparison_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(answer: str, reference: str) -> bool:
        raise RuntimeError("symbolic engine")

    monkeypatch.setattr("megatron_octo.grading._symbolically_equal", broken)
    result = grade("\\boxed{x+1}", "1+x")
    assert (result.answer, result.correct, result.failed) == ("x+1", False, True)


def test_grading_works_outside_of_the_main_thread() -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(is_correct("\\boxed{x+1}", "1+x")))
    thread.start()
    thread.join()
    assert seen == [True]


def test_plain_numbers_never_load_the_symbolic_engine() -> None:
    code = (
        "import sys; from megatron_octo.grading import is_correct;"
        "assert is_correct('\\\\boxed{\\\\frac{1}{2}}', '0.5') and not is_correct('\\\\boxed{1,234}', '5');"
        "assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
