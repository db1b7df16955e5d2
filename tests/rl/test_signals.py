"""What a response shows besides being right."""

from __future__ import annotations

import pytest

from megatron_octo.rl.signals import of_response


@pytest.mark.parametrize(
    "text", [r"\boxed{3}", "\n  \\boxed{3} since", r"$\boxed{3}$", r"\[ \boxed{3} \]", r": **\boxed{3}**"]
)
def test_an_answer_at_the_start_is_seen(text: str) -> None:
    assert of_response(text, [-1.0], right=True)["boxed_at_start"] == 1.0


@pytest.mark.parametrize("text", ["", "3", r"So \boxed{3}", r"The answer is $\boxed{3}$", "boxed"])
def test_an_answer_elsewhere_is_not_at_the_start(text: str) -> None:
    assert of_response(text, [-1.0], right=True)["boxed_at_start"] == 0.0


def test_length_counts_for_right_responses_and_entropy_for_all() -> None:
    right = of_response("x", [-1.0, -2.0, -3.0], right=True)
    wrong = of_response("x", [-1.0, -2.0, -3.0], right=False)
    assert (right["right_tokens"], wrong["right_tokens"]) == (3.0, 0.0)
    assert right["entropy"] == wrong["entropy"] == pytest.approx(2.0)


def test_the_entropy_of_many_samples_is_that_of_their_distribution() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(50, generator=generator).log_softmax(0)
    sampled = torch.multinomial(log_probs.exp(), 20_000, replacement=True, generator=generator)
    exact = float(-(log_probs.exp() * log_probs).sum())
    assert of_response("x", log_probs[sampled].tolist(), right=True)["entropy"] == pytest.approx(exact, rel=0.02)


def test_a_response_without_tokens_has_no_entropy() -> None:
    assert of_response("", [], right=False) == {"boxed_at_start": 0.0, "right_tokens": 0.0, "entropy": 0.0}
