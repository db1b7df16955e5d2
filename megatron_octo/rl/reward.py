"""OpenRLHF's reward file (`--reward.remote_url`): +1 for the right final answer, -1 for anything else.

OpenRLHF loads it by path inside its rollout process and calls it once a sample, from a thread. It
swallows an exception with one log line and goes on without a reward, so nothing here raises: a
failure of ours scores as a wrong answer and shows up as `reward_error` in the metrics.
"""

from __future__ import annotations

import re
import time
from typing import Any

from megatron_octo.grading import grade

RIGHT, WRONG = 1.0, -1.0
_CONTROL_TOKENS = re.compile(r"<\|[^<>|]{1,40}\|>|</?s>|<pad>|<unk>")


def reward_func(queries: list[str], prompts: list[str], labels: list[str], **_: Any) -> dict[str, Any]:
    """Grade responses.

    `queries` are prompts with their responses, control tokens in them; each result has one value a query.
    `scores` and the log `acc` are 1 or 0 (right), `boxed` says whether there is a final answer at all; `reward_s` is
    the processor's time for it.
    """
    import torch

    began = time.thread_time()
    graded = [_grade(query, prompt, label) for query, prompt, label in zip(queries, prompts, labels, strict=True)]
    right, boxed, error = (torch.tensor(column, dtype=torch.float32) for column in zip(*graded, strict=True))
    seconds = torch.full_like(right, (time.thread_time() - began) / len(queries))
    return {
        "rewards": torch.where(right > 0, RIGHT, WRONG),
        "scores": right,
        "extra_logs": {"acc": right, "boxed": boxed, "reward_error": error, "reward_s": seconds},
    }


def response_of(query: str, prompt: str) -> str | None:
    """What follows the prompt in the query, without control tokens; None where the prompt is not in it."""
    _, found, response = query.partition(prompt)
    return _CONTROL_TOKENS.sub("", response) if found else None


def _grade(query: str, prompt: str, label: str) -> tuple[float, float, float]:
    """(right, boxed, error), each 0 or 1."""
    try:
        response = response_of(query, prompt)
        if response is None:
            return 0.0, 0.0, 1.0
        result = grade(response, str(label))
    except Exception:
        return 0.0, 0.0, 1.0
    return float(result.correct), float(result.answer is not None), float(result.failed)
