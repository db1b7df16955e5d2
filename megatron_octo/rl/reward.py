"""What a response is worth: +1 for the right final answer, -1 for any other, and the terms that the settings add."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

from megatron_octo import symbolic
from megatron_octo.config.rl import RewardTerms
from megatron_octo.grading import grade

RIGHT, WRONG = 1.0, -1.0
_SIGNS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Reward:
    """What a response is worth, and why."""

    value: float
    correct: bool
    boxed: bool
    """Whether it has a final answer at all."""
    repetition: float
    """Share of its n-grams that occurred in it before."""
    failed: bool = False
    """The grading itself broke; the response then counts as wrong."""
    seconds: float = 0.0
    """Processor seconds that it took, in this thread and in math-verify's process."""

    def logs(self) -> dict[str, float]:
        """What OpenRLHF averages over a step."""
        return {
            "acc": float(self.correct),
            "boxed": float(self.boxed),
            "repetition": self.repetition,
            "reward_error": float(self.failed),
            "reward_s": self.seconds,
        }


FAILED = Reward(WRONG, correct=False, boxed=False, repetition=0.0, failed=True)


def reward(response: str, reference: str, terms: RewardTerms) -> Reward:
    """Grade a response. Never raises: one that broke the grading must not end hours of work."""
    began = time.thread_time() + symbolic.seconds()
    graded = _graded(response, reference, terms)
    return replace(graded, seconds=time.thread_time() + symbolic.seconds() - began)


def _graded(response: str, reference: str, terms: RewardTerms) -> Reward:
    try:
        graded = grade(response, reference)
        boxed = graded.answer is not None
        repetition = repeated_share(response, terms.repetition_ngram)
        value = RIGHT if graded.correct else WRONG
        value += terms.format if boxed else -terms.format
        value -= terms.repetition * repetition
        return Reward(value, graded.correct, boxed, repetition, graded.failed)
    except Exception:
        return FAILED


def repeated_share(text: str, length: int) -> float:
    """The share of a text's n-grams of `length` words and signs that occurred in it before; 0 in a shorter text."""
    words = _SIGNS.findall(text)
    ngrams = list(zip(*(words[start:] for start in range(length)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
