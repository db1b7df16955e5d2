"""The reward: the answer, the terms that settings add, and that nothing makes it raise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_octo import symbolic
from megatron_octo.config.rl import RewardTerms
from megatron_octo.errors import SettingsError
from megatron_octo.rl.reward import FAILED, repeated_share, reward

PLAIN = RewardTerms()
LOOP = "so the answer is \\boxed{5} and " * 40


@pytest.mark.parametrize(
    ("response", "value", "boxed"),
    [
        ("2+3=5\nThe answer is \\boxed{5}.", 1.0, True),
        ("The answer is \\boxed{6}.", -1.0, True),
        ("The answer is 5.", -1.0, False),
        ("\\boxed{" * 2000, -1.0, False),
        ("", -1.0, False),
        (LOOP, 1.0, True),
    ],
)
def test_the_paper_s_reward_is_plus_or_minus_one(response: str, value: float, boxed: bool) -> None:
    given = reward(response, "5", PLAIN)
    assert (given.value, given.correct, given.boxed, given.failed) == (value, value > 0, boxed, False)


@pytest.mark.parametrize(
    ("response", "value"), [("\\boxed{5}", 1.25), ("\\boxed{6}", -0.75), ("five", -1.25), ("\\boxed{", -1.25)]
)
def test_a_box_is_worth_the_format_term(response: str, value: float) -> None:
    assert reward(response, "5", RewardTerms(format=0.25)).value == value


def test_repetition_takes_its_share_off() -> None:
    terms = RewardTerms(repetition=0.5, repetition_ngram=4)
    once, again = "a b c d e f \\boxed{5}", "a b c d a b c d \\boxed{5}"
    assert reward(once, "5", terms).value == 1.0
    given = reward(again, "5", terms)
    assert given.repetition == pytest.approx(1 / 10)  # 13 words and signs have 10 runs of four; a b c d twice
    assert given.value == pytest.approx(1 - 0.5 / 10)
    assert reward(LOOP, "5", terms).value < 0.6


def test_signs_count_as_words_and_spaces_do_not() -> None:
    assert repeated_share("x=1;x=1;", 4) == repeated_share("x = 1 ; x = 1 ;", 4) == pytest.approx(1 / 5)
    assert repeated_share("x x x", 4) == 0.0


def test_terms_below_zero_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"reward\.format -0.5 is below 0"):
        RewardTerms(format=-0.5)
    with pytest.raises(SettingsError, match=r"reward\.repetition_ngram 0"):
        RewardTerms(repetition_ngram=0)


def test_a_failure_of_the_comparison_is_wrong_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(answer: str, reference: str) -> bool:
        raise MemoryError

    monkeypatch.setattr("megatron_octo.grading.answers_equal", broken)
    given = reward("\\boxed{5}", "5", RewardTerms(format=0.25))
    assert (given.value, given.correct, given.failed) == (-0.75, False, True)
    logs = given.logs()
    assert logs.pop("reward_s") > 0
    assert logs == {"acc": 0.0, "boxed": 1.0, "repetition": 0.0, "reward_error": 1.0}


def test_its_seconds_are_those_of_math_verify_s_process_too() -> None:
    reward("\\boxed{x+1}", "1+x", PLAIN)  # the process is there
    for answer in ("x^2+1", "x^2+2"):
        before = symbolic.seconds()
        given = reward(f"\\boxed{{{answer}}}", "1+x^2", PLAIN)
        assert given.seconds > symbolic.seconds() - before > 0
    assert reward("\\boxed{5}", "5", PLAIN).seconds > 0, "without the process"


def test_what_is_not_text_is_an_error_and_no_exception() -> None:
    response: Any = None
    assert replace(reward(response, "5", PLAIN), seconds=0.0) == FAILED
