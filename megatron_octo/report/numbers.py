"""The report as plain values: the verdict, the tables, the descent. `page.py` draws them; report.json holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_octo.evaluate.run import Scores
from megatron_octo.lineage import Lineage
from megatron_octo.report.load import Branch, Report, Run, best, compare

FINAL_SHARE = 0.05


@dataclass(kw_only=True, slots=True)
class Node:
    """One box of the descent; its children start from its weights."""

    kind: str
    name: str
    step: int | None
    tokens: int
    weights_sha256: str
    children: list[Node] = field(default_factory=list)

    def is_of(self, link: Lineage) -> bool:
        """Whether this box stands for `link`; a run whose step is not known yet is the same run."""
        same_step = self.step == link.step or self.step is None or link.step is None
        return (self.kind, self.name) == (link.kind, link.name) and same_step

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "kind": self.kind,
            "name": self.name,
            "step": self.step,
            "tokens": self.tokens,
            "weights_sha256": self.weights_sha256,
            "children": [child.to_dict() for child in self.children],
        }


def numbers(report: Report) -> dict[str, Any]:
    """Everything that the tables show, and the curves as they were logged."""
    return {
        "title": report.title,
        "verdict": verdict(report),
        "notes": list(report.notes),
        "lineage": [node.to_dict() for node in descent(report)],
        "stable": {**run_numbers(report.stable), "scores": _scores(report.stable_scores)} if report.stable else None,
        "branches": [_branch(branch) for branch in report.branches],
        "stages": [{"stage": each.stage, "seconds": each.seconds, "peak_gib": each.peak_gib} for each in report.costs],
        "seconds": sum(each.seconds for each in report.costs),
    }


def verdict(report: Report) -> str:
    """One sentence or two: which branch became the best reasoner, by how much, how sure that is."""
    ranking = best(report)
    if not ranking:
        return "No branch has been scored yet."
    first = ranking[0]
    scores = first.after or first.before
    assert scores is not None, "`best` leaves out branches without scores"
    when = "After" if first.after else "Before"
    parts = [
        f"{when} RL, branch {first.train.label} is the best reasoner: {percent(scores.accuracy)}% "
        f"{interval(scores.accuracy_interval)} of its answers to {scores.num_problems:,} problems are right"
        f"{_lead(ranking)}."
    ]
    if first.gain:
        parts.append(f"RL changed its accuracy by {points(first.gain)} points.")
    if not first.after:
        parts.append("Nothing has been scored after RL yet.")
    elif len(ranking) < len(report.branches):
        missing = [branch.train.label for branch in report.branches if branch.after is None]
        parts.append(f"Not scored after RL yet: {', '.join(missing)}.")
    return " ".join(parts)


def descent(report: Report) -> list[Node]:
    """The trees of who comes from whom. Exports are the same weights in another format, so they have no box."""
    runs = [report.stable, *(branch.train for branch in report.branches), *(branch.rl for branch in report.branches)]
    roots: list[Node] = []
    for run in runs:
        level = roots
        for link in run.descent.chain() if run and run.descent else []:
            if link.kind == "export":
                continue
            node = next((each for each in level if each.is_of(link)), None)
            if node is None:
                node = Node(kind=link.kind, name=link.name, step=None, tokens=0, weights_sha256="")
                level.append(node)
            if link.step is not None or node.step is None:
                node.step = link.step
            node.tokens = max(node.tokens, link.tokens)
            node.weights_sha256 = link.weights_sha256 or node.weights_sha256
            level = node.children
    return roots


def run_numbers(run: Run) -> dict[str, Any]:
    """What a training run's row shows."""
    last = run.rows[-1] if run.rows else {}
    return {
        "name": run.name,
        "label": run.label,
        "status": run.status,
        "steps": int(last["step"]) if last else 0,
        "tokens": int(last.get("tokens", 0)),
        "start_tokens": run.start_tokens,
        "final_loss": _final(run, "train/loss"),
        "tokens_per_second": _middle(run, "throughput/tokens_per_second"),
        "seconds": last.get("time_s"),
    }


def rl_numbers(run: Run) -> dict[str, Any]:
    """What an RL run's row shows."""
    kl = [abs(value) for value in run.curve("rl/vllm_kl", "step")[1]]
    return {
        "name": run.name,
        "status": run.status,
        "steps": int(run.rows[-1]["step"]) if run.rows else 0,
        "first_reward": _edge(run, "rl/reward_mean", 0),
        "last_reward": _edge(run, "rl/reward_mean", -1),
        "first_length": _edge(run, "rl/response_length_mean", 0),
        "last_length": _edge(run, "rl/response_length_mean", -1),
        "largest_vllm_kl": max(kl, default=None),
        "turns": [asdict(turn) for turn in run.turns],
        "seconds": run.rows[-1].get("time_s") if run.rows else None,
    }


def percent(share: float) -> str:
    """0.7451 as `74.5`."""
    return f"{100 * share:.1f}"


def interval(bounds: Sequence[float]) -> str:
    """Shares as `[70.1, 78.6]`, in percent."""
    return f"[{percent(bounds[0])}, {percent(bounds[1])}]"


def points(difference: tuple[float, float, float]) -> str:
    """A difference of shares as `+47.1 [+43.0, +51.0]`, in percentage points."""
    middle, low, high = (f"{100 * each:+.1f}" for each in difference)
    return f"{middle} [{low}, {high}]"


def _lead(ranking: list[Branch]) -> str:
    if len(ranking) < 2:
        return ""
    first, second = ranking[:2]
    lead = compare(second.after, first.after) if first.after else compare(second.before, first.before)
    if lead is None:
        return ""
    sure = "" if lead[1] > 0 else ", a lead that may be chance"
    return f", {points(lead)} points ahead of {second.train.label}, the next{sure}"


def _branch(branch: Branch) -> dict[str, Any]:
    gain = branch.gain
    return {
        **run_numbers(branch.train),
        "before": _scores(branch.before),
        "after": _scores(branch.after),
        "gain": {"difference": gain[0], "interval": list(gain[1:])} if gain else None,
        "rl": rl_numbers(branch.rl) if branch.rl else None,
    }


def _scores(scores: Scores | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {
        "task": scores.task,
        "num_problems": scores.num_problems,
        "samples_per_problem": scores.samples_per_problem,
        "temperature": scores.temperature,
        "accuracy": scores.accuracy,
        "accuracy_interval": list(scores.accuracy_interval),
        "boxed_share": scores.boxed_share,
        "mean_tokens": scores.mean_tokens,
        "truncated_share": scores.truncated_share,
    }


def _final(run: Run, metric: str) -> float | None:
    """The mean over the last twentieth of the steps: one step's loss is noise."""
    values = run.curve(metric, "step")[1]
    last = values[-max(1, round(FINAL_SHARE * len(values))) :]
    return sum(last) / len(last) if last else None


def _middle(run: Run, metric: str) -> float | None:
    values = sorted(run.curve(metric, "step")[1])
    return values[len(values) // 2] if values else None


def _edge(run: Run, metric: str, index: int) -> float | None:
    values = run.curve(metric, "step")[1]
    return values[index] if values else None
