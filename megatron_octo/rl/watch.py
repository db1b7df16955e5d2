"""Does a run look wrong, and what then: pure functions of the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import get_args

from megatron_octo.config.rl import RLAction, RLWatchConfig
from megatron_octo.rl.collect import Row

MOST_VLLM_KL_CPU, MOST_VLLM_KL_GPU = 1e-3, 0.02
LEAST_FALL = 0.05  # of the share of right answers: where there are hardly any, half of them is noise
ALWAYS = ("rl/reward_mean", "rl/policy_loss", "rl/vllm_kl", "optim/grad_norm")
"""What every row has, unless it was no finite number."""
ACTIONS: tuple[RLAction, ...] = get_args(RLAction)  # the mildest first


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is wrong with a run."""

    step: int
    """Where it was found."""
    since: int
    """The step at which it began: earlier saves are good."""
    what: str
    """The numbers and what they were compared with."""
    action: RLAction
    """What follows."""


class Trouble(Exception):
    """A finding that ends this run of OpenRLHF."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


def judge(config: RLWatchConfig, rows: Sequence[Row], *, roll_backs: int, cuda: bool) -> Finding | None:
    """What is wrong with a run whose last step is the last row, after so many roll backs; of several, the gravest."""
    gravest = max(_findings(config, rows, cuda=cuda), key=lambda each: ACTIONS.index(each.action), default=None)
    if gravest and gravest.action == "roll_back" and roll_backs >= config.most_roll_backs:
        what = f"{gravest.what}, after {roll_backs} roll backs"
        return Finding(step=gravest.step, since=gravest.since, what=what, action="stop")
    return gravest


def largest_vllm_kl(config: RLWatchConfig, *, cuda: bool) -> float:
    """The bound on |vllm_kl|."""
    return config.most_vllm_kl or (MOST_VLLM_KL_GPU if cuda else MOST_VLLM_KL_CPU)


def _findings(config: RLWatchConfig, rows: Sequence[Row], *, cuda: bool) -> Iterator[Finding]:
    row = rows[-1]
    step = int(row["step"])
    if missing := [name for name in ALWAYS if name not in row]:
        what = f"{', '.join(missing)}: no finite number"
        yield Finding(step=step, since=step, what=what, action=config.on_non_finite)
    bound = largest_vllm_kl(config, cuda=cuda)
    if abs(row.get("rl/vllm_kl", 0.0)) >= bound:
        what = (
            f"vllm_kl is {row['rl/vllm_kl']:.3g}, not within {bound:g}: vLLM's log-probabilities differ from the "
            "trainer's, as they do when it samples from old weights"
        )
        yield Finding(step=step, since=step, what=what, action=config.on_stale_weights)
    yield from _growing_gap(config, rows, least=bound / 2)
    yield from _collapse(config, rows)
    yield from _repetition(config, rows)
    yield from _reward_errors(config, rows)


def _growing_gap(config: RLWatchConfig, rows: Sequence[Row], *, least: float) -> Iterator[Finding]:
    known = [row for row in rows if "rl/vllm_kl" in row]
    gap = _Course.of([abs(row["rl/vllm_kl"]) for row in known], config.window_steps)
    if gap is not None and gap.now >= max(config.vllm_kl_rise * gap.lowest, least):
        what = f"|vllm_kl| rose from {gap.lowest:.3g} to {gap.now:.3g} (means of {config.window_steps} steps)"
        yield _finding(known, gap.steps_beyond(gap.lowest, falling=False), what, config.on_stale_weights)


def _collapse(config: RLWatchConfig, rows: Sequence[Row]) -> Iterator[Finding]:
    known = [row for row in rows if {"rl/accuracy", "rl/truncated_share"} <= row.keys()]
    score = _Course.of([row["rl/accuracy"] for row in known], config.window_steps)
    if score is None:
        return
    cut_off = fmean(row["rl/truncated_share"] for row in known[-config.window_steps :])
    fall = max(config.score_fall * score.highest, LEAST_FALL)
    if score.highest - score.now >= fall and cut_off >= config.truncated_share:
        what = (
            f"right answers fell from {score.highest:.1%} to {score.now:.1%} (means of {config.window_steps} steps) "
            f"while {cut_off:.1%} of the responses are cut off"
        )
        since = score.steps_beyond(score.highest, falling=True)
        yield _finding(known, since, what, config.on_collapse)


def _repetition(config: RLWatchConfig, rows: Sequence[Row]) -> Iterator[Finding]:
    known = [row for row in rows if "rl/repetition_share" in row]
    share = _Course.of([row["rl/repetition_share"] for row in known], config.window_steps)
    if share is not None and share.now - share.lowest >= config.repetition_rise:
        what = (
            f"the repeated share of responses rose from {share.lowest:.1%} to {share.now:.1%} "
            f"(means of {config.window_steps} steps)"
        )
        yield _finding(known, share.steps_beyond(share.lowest, falling=False), what, config.on_repetition)


def _reward_errors(config: RLWatchConfig, rows: Sequence[Row]) -> Iterator[Finding]:
    shares = [row.get("rl/reward_error_share", 0.0) for row in rows[-config.window_steps :]]
    if len(shares) == config.window_steps and min(shares) > config.reward_error_share:
        what = f"the grading broke on at least {min(shares):.1%} of the responses in each of {len(shares)} steps"
        yield _finding(rows, len(shares), what, config.on_reward_errors)


@dataclass(frozen=True, slots=True)
class _Course:
    """A curve's mean over its last window, and the extremes of the means over all windows."""

    values: Sequence[float]
    window: int
    now: float
    highest: float
    lowest: float

    @classmethod
    def of(cls, values: Sequence[float], window: int) -> _Course | None:
        """None while there are no two windows."""
        if len(values) < 2 * window:
            return None
        means = [fmean(values[start : start + window]) for start in range(len(values) - window + 1)]
        return cls(values, window, means[-1], max(means), min(means))

    def steps_beyond(self, extreme: float, *, falling: bool) -> int:
        """How many last steps lie on this side of the middle between `extreme` and now; the window at least."""
        middle = (extreme + self.now) / 2
        beyond = takewhile(lambda value: (value < middle) == falling, reversed(self.values))
        return max(self.window, sum(1 for _ in beyond))


def _finding(rows: Sequence[Row], num_steps: int, what: str, action: RLAction) -> Finding:
    """A finding about the last `num_steps` rows."""
    return Finding(step=int(rows[-1]["step"]), since=int(rows[-num_steps]["step"]), what=what, action=action)
