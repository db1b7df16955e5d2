"""Final answers out of text, and two answers compared."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_octo import symbolic
from megatron_octo.grading import answers_equal, extract_answer, grade, is_correct
from tests.unit.grading_cases import CASES

ENDLESS = "(7^{99})!"
"""Math-verify works at it for ever, in little memory."""


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
        ("\\\\boxed{5}", "5"),
        ("\\\\\\boxed{5}", "5"),
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


@pytest.mark.parametrize("kind", CASES)
def test_hard_cases(kind: str) -> None:
    wrong = [case for case in CASES[kind] if answers_equal(*case[:2]) is not case[2]]
    assert wrong == []


def test_there_are_many_hard_cases() -> None:
    assert sum(map(len, CASES.values())) >= 200


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
        "\\boxed{" + ",;" * 900 + "x}",
        "\\boxed{5^\\circ" + " " * 1_900 + "a}",
        "\\boxed{" + "\\frac{" * 300 + "1" + "}" * 300 + "}",
        "\\boxed{" + "\\sqrt{" * 60 + "1" + "}" * 60 + "}",
        "\\boxed{\\binom{99999999}{4999999}}",
        "\\boxed{\\sum_{k=1}^{999999} k^{99}}",
    ],
)
def test_hostile_text_is_wrong_and_does_not_hang(text: str) -> None:
    assert not is_correct(text, "5")
    assert is_correct("\\boxed{x+1}", "1+x"), "the next comparison is as good as ever"


def test_a_response_without_a_box_is_wrong_even_if_it_says_the_answer() -> None:
    assert not is_correct("The answer is 5.", "5")


def test_only_the_last_box_counts() -> None:
    assert is_correct("\\boxed{4}? no: \\boxed{5}", "5")
    assert not is_correct("\\boxed{5}? no: \\boxed{4}", "5")


def test_a_grade_says_when_the_comparison_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*pairs: tuple[str, str]) -> bool:
        raise RuntimeError("symbolic engine")

    monkeypatch.setattr("megatron_octo.symbolic.equal", broken)
    result = grade("\\boxed{x+1}", "1+x")
    assert (result.answer, result.correct, result.failed) == ("x+1", False, True)


def test_a_comparison_that_would_take_for_ever_is_ended_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = symbolic.Engine(cpu_seconds=0.5)
    monkeypatch.setattr("megatron_octo.symbolic.equal", engine.equal)
    assert grade(f"\\boxed{{{ENDLESS}}}", "5").failed
    assert grade("\\boxed{x+1}", "1+x").correct
    with pytest.raises(symbolic.Undecided, match=f"code -{signal.SIGPROF}"):
        engine.equal((ENDLESS, "6"))


def test_an_answer_that_ran_into_the_limit_is_not_tried_again() -> None:
    engine = symbolic.Engine(cpu_seconds=0.5)
    with pytest.raises(symbolic.Undecided, match="ended with code"):
        engine.equal((ENDLESS, "5"))
    with pytest.raises(symbolic.Undecided, match="ran out of time at it before"):
        engine.equal((ENDLESS, "5"))
    assert engine._process is None, "no other was started"


def test_all_spellings_of_an_answer_are_under_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[str, str], ...]] = []

    def equal(*pairs: tuple[str, str]) -> bool:
        asked.append(pairs)
        return False

    monkeypatch.setattr("megatron_octo.symbolic.equal", equal)
    assert not answers_equal("X + 1", "1 + 2X")
    assert asked == [(("x+1", "1+2x"), ("X + 1", "1 + 2X"))]


def test_each_spelling_is_compared() -> None:
    engine = symbolic.Engine()
    assert engine.equal(("x", "y"), ("x+1", "1+x"))
    assert not engine.equal(("x", "y"), ("x+1", "2+x"))


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "9 ^ {9 ^ 9}", "7^{777^{7}}", "2**(10**7)", "\\sqrt{9^{9^9}}", "(99!)!", "\\frac{(10!)!}{2}"]
)
def test_towers_and_factorials_that_run_away_never_reach_the_engine(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_octo.symbolic.equal", lambda *_: pytest.fail("asked"))
    assert not answers_equal(text, "\\sqrt{8}")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("2^{2^{5}}", "4294967296"), ("x^{2^3}", "x^8"), ("2^{10^{2}}", "4^{50}"), ("(3!)!", "720")],
)
def test_small_towers_and_factorials_are_compared(answer: str, reference: str) -> None:
    assert answers_equal(answer, reference)


def test_processor_seconds_are_the_process_s_and_the_asking_thread_s() -> None:
    engine = symbolic.Engine(cpu_seconds=0.5)
    engine.equal(("x+1", "1+x"))
    assert engine._process is not None
    started = engine.seconds
    assert started == engine._counted > 0
    engine.equal(("x+2", "2+x"))
    assert started < engine.seconds == pytest.approx(engine._counted), "its start counts once"
    before = engine.seconds
    with pytest.raises(symbolic.Undecided):
        engine.equal((ENDLESS, "5"))
    ended = engine.seconds
    assert ended - before > 0.25, "what was ended counts, too"
    engine.equal(("x+3", "3+x"))
    assert engine.seconds - ended == pytest.approx(engine._counted), "another process begins at 0"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: engine.seconds).result() == 0


def test_a_process_that_was_killed_is_replaced() -> None:
    engine = symbolic.Engine()
    assert engine.equal(("x+1", "1+x"))
    assert engine._process is not None
    engine._process.kill()
    engine._process.wait()
    assert engine.equal(("x+1", "1+x"))


def test_many_threads_share_one_process() -> None:
    engine = symbolic.Engine()
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda n: engine.equal((f"x+{n}", f"{n % 3}+x")), range(24)))
    assert verdicts == [n == n % 3 for n in range(24)]


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
