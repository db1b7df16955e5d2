"""How sure an accuracy is: 95% intervals in which problems, not answers, are the independent draws.

The answers to one problem resemble each other, so whole problems are resampled: the percentile bootstrap
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) over clusters. Where every
problem scores the same, an interval has no width: resampling cannot show what was never drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK_DRAWS = 4_000_000


def accuracy_interval(per_problem: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of `per_problem`, each the share of one problem's answers that are right.

    Raises:
        ValueError: there is no problem.
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one problem")
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(_resampled_means(values, seed), (tail, 100 - tail))
    return float(low), float(high)


def paired_difference(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """(mean difference after - before, its 95% interval): what the same problems gained.

    Pairing removes what makes one problem harder than another, so the interval is narrower than two
    separate ones suggest.

    Raises:
        ValueError: the two do not list the same number of problems, or none.
    """
    if len(before) != len(after):
        raise ValueError(f"paired scores need the same problems, not {len(before)} and {len(after)}")
    gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    low, high = accuracy_interval(gains.tolist(), seed=seed)
    return float(gains.mean()), low, high


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """RESAMPLES means of as many draws with replacement as there are values, in pieces that fit in memory."""
    draw = np.random.default_rng(seed)
    rows = max(1, CHUNK_DRAWS // values.size)
    means = [
        values[draw.integers(values.size, size=(min(rows, RESAMPLES - start), values.size))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(means)
