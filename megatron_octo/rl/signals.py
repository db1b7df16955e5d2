r"""What a response shows besides being right or wrong: numbers for the curves.

OpenRLHF averages each over the samples of a step (`extra_logs` of a response); `collect.py` gives them their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_BOXED_AT_START = re.compile(r"[\s$*:]*(?:\\[(\[])?\s*\\boxed")


def of_response(response: str, log_probs: Sequence[float], *, right: bool) -> dict[str, float]:
    """Of a response and the log-probability of each of its tokens: whether it begins with its answer, its length if it
    is right, and its entropy.

    The mean surprise of sampled tokens is an unbiased estimate of the sampling distribution's entropy, and free.
    OpenRLHF's own (`--actor.entropy_coef 0`) keeps all logits a second time, and shrinks with the number of packs.
    """
    return {
        "boxed_at_start": float(_BOXED_AT_START.match(response) is not None),
        "right_tokens": float(len(log_probs)) if right else 0.0,
        "entropy": -sum(log_probs) / len(log_probs) if log_probs else 0.0,
    }
