"""The figures of the report, as plotly figures.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; dashes tell the curves apart in
grey print. Every axis names its unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_octo.report.load import Report, Run
from megatron_octo.stage_log import StageCost

INK, GRID, STABLE = "#222222", "#e3e3e3", "#555555"
BRANCH_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
BEFORE, AFTER = "#B5C7D9", "#0072B2"
MAX_POINTS = 600
SMOOTHING_SHARE = 0.04
RAW_OPACITY = 0.25
MARKER_STEPS = 60
UPDATES = "rl/updates"


@dataclass(frozen=True, slots=True)
class Panel:
    """A metric of RL and how it is drawn."""

    metric: str
    title: str
    unit: str
    limit: str = ""
    """The metric that bounds it, drawn as a line; the axis is then logarithmic and the sign left out."""


RL_AXES = (
    Panel("rl/accuracy", "Right answers in the rollouts", "share"),
    Panel("rl/response_length_mean", "Response length", "tokens"),
)
"""What the paper plots."""
RL_PANELS = (
    Panel("rl/reward_mean", "Mean reward", "reward"),
    Panel("rl/right_length_mean", "Length of right responses", "tokens"),
    Panel("rl/wrong_length_mean", "Length of wrong responses", "tokens"),
    Panel("rl/truncated_share", "Cut off at the longest response", "share"),
    Panel("rl/boxed_at_start_share", "Begin with their answer", "share"),
    Panel("rl/repetition_share", "Repeated n-grams", "share"),
    Panel("rl/entropy", "Entropy", "nats a token"),
    Panel("rl/clip_share", "Clipped by PPO", "share of tokens"),
    Panel("optim/grad_norm", "Gradient norm", "norm"),
    Panel("rl/vllm_kl", "Sampled against trained: |vllm_kl|", "nats a token", "rl/most_vllm_kl"),
)


def loss(report: Report) -> Any:
    """Loss over tokens, smoothed, the raw curve faint behind it."""
    return _over_tokens(report, "train/loss", "loss (nats a token)", smooth=True)


def rate(report: Report) -> Any:
    """Learning rate over tokens."""
    figure = _over_tokens(report, "optim/lr", "learning rate", smooth=False)
    figure.update_yaxes(rangemode="tozero", tickformat=".1e")
    return figure


def accuracy(report: Report) -> Any:
    """Right answers before and after RL, with 95% intervals."""
    figure = _figure(360)
    before = {branch.train.label: branch.before for branch in report.branches}
    if report.stable_scores:
        before = {"stable": report.stable_scores, **before}
    after = {branch.train.label: branch.after for branch in report.branches}
    for name, colour, scores in (("before RL", BEFORE, before), ("after RL", AFTER, after)):
        scored = {label: each for label, each in scores.items() if each}
        values = [100 * each.accuracy for each in scored.values()]
        figure.add_bar(
            name=name,
            x=list(scored),
            y=values,
            error_y={
                "type": "data",
                "array": [100 * (each.accuracy_interval[1] - each.accuracy) for each in scored.values()],
                "arrayminus": [100 * (each.accuracy - each.accuracy_interval[0]) for each in scored.values()],
                "color": INK,
                "thickness": 1.2,
                "width": 4,
            },
            marker={"color": colour},
            text=[f"{value:.1f}" for value in values],
            textposition="inside",
            textangle=0,
            insidetextanchor="start",
            textfont={"color": INK if colour == BEFORE else "white"},
            hovertemplate="%{x}: %{y:.1f}%<extra>" + name + "</extra>",
        )
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(title="", categoryorder="array", categoryarray=list(before), showgrid=False)
    figure.update_yaxes(title="right answers (%)", rangemode="tozero")
    return figure


def rl_panels(report: Report) -> list[Panel]:
    """What else the RL runs have logged, validation first."""
    logged = dict.fromkeys(name for _, run in _rl_runs(report) for row in run.rows for name in row)
    validation = [
        Panel(name, f"Right answers: {name.split('/')[1]}", "share")
        for name in logged
        if name.startswith("valid/") and name.endswith("/accuracy")
    ]
    return [*validation, *(panel for panel in RL_PANELS if panel.metric in logged)]


def over_updates(report: Report, panel: Panel, *, small: bool = False) -> Any:
    """A metric of every branch's RL run over its optimizer updates, as in the paper; a small one has no legend."""
    figure = _figure(210 if small else 300)
    for index, run in _rl_runs(report):
        x, y = run.curve(panel.metric, UPDATES)
        if panel.limit:
            y = [abs(value) for value in y]
        colour, dash = BRANCH_COLOURS[index % len(BRANCH_COLOURS)], DASHES[index % len(DASHES)]
        if len(x) <= MARKER_STEPS:
            _line(figure, run.label, x, y, colour=colour, dash=dash, mode="lines+markers")
        else:
            _line(figure, run.label, x, y, colour=colour, opacity=RAW_OPACITY, width=1, legend=False)
            _line(figure, run.label, x, smoothed(y), colour=colour, dash=dash)
    end = 1 + max(run.rows[-1][UPDATES] for _, run in _rl_runs(report))
    figure.update_xaxes(title="optimizer updates", range=[0, end])
    figure.update_yaxes(title=panel.unit, rangemode="tozero")
    if panel.limit:
        for limit in sorted({value for _, run in _rl_runs(report) for value in run.curve(panel.limit, UPDATES)[1]}):
            _line(figure, "limit", [0, end], [limit] * 2, colour=INK, dash="dot", width=1, legend=False)
        figure.update_yaxes(type="log", dtick=1, tickformat=".0e")
    _turns(figure, report)
    if small:
        figure.update_layout(showlegend=False, margin={"t": 8, "b": 40}, font={"size": 11})
    return figure


def costs(stages: Sequence[StageCost]) -> Any:
    """What each stage took, in the order in which they ran."""
    long = max(each.seconds for each in stages) > 7200
    unit, scale = ("hours", 3600) if long else ("seconds", 1)
    figure = _figure(90 + 26 * len(stages))
    figure.add_bar(
        x=[each.seconds / scale for each in stages],
        y=[each.stage for each in stages],
        orientation="h",
        marker={"color": AFTER},
        hovertemplate="%{y}: %{x:.1f} " + unit + "<extra></extra>",
    )
    figure.update_layout(showlegend=False, margin={"t": 8})
    figure.update_xaxes(title=f"time ({unit})", rangemode="tozero")
    figure.update_yaxes(title="", autorange="reversed", showgrid=False, automargin=True)
    return figure


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the values around each, over a window of SMOOTHING_SHARE of them, cut at the ends."""
    import numpy as np

    half = max(1, round(SMOOTHING_SHARE * len(values) / 2))
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(values, dtype=np.float64))))
    centre = np.arange(len(values))
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    means: list[float] = ((sums[high] - sums[low]) / (high - low)).tolist()
    return means


def thinned(values: Sequence[float]) -> list[float]:
    """At most about MAX_POINTS of the values, evenly spaced; the first and the last stay."""
    stride = -(-len(values) // MAX_POINTS)
    kept = list(values[::stride]) if values else []
    return kept if not values or (len(values) - 1) % stride == 0 else [*kept, values[-1]]


def _over_tokens(report: Report, metric: str, unit: str, *, smooth: bool) -> Any:
    """A training metric: the stable stage, then each branch from the token at which it left."""
    figure = _figure(340)
    runs = [(report.stable, STABLE, "solid")] if report.stable else []
    for index, branch in enumerate(report.branches):
        runs.append((branch.train, BRANCH_COLOURS[index % len(BRANCH_COLOURS)], DASHES[index % len(DASHES)]))
    drawn = [(run, *run.curve(metric, "tokens"), colour, dash) for run, colour, dash in runs]
    if smooth:
        for run, x, y, colour, _ in drawn:
            _line(figure, run.label, thinned(x), thinned(y), colour=colour, opacity=RAW_OPACITY, width=1, legend=False)
    for run, x, y, colour, dash in drawn:
        _line(figure, run.label, thinned(x), thinned(smoothed(y) if smooth else y), colour=colour, dash=dash)
    borders = sorted({branch.train.start_tokens for branch in report.branches if branch.train.start_tokens})
    for border in borders:
        figure.add_vline(x=border, line={"color": INK, "width": 1, "dash": "dot"})
    if borders:
        figure.add_annotation(
            x=borders[0],
            y=0.5,
            yref="paper",
            yanchor="middle",
            xanchor="right",
            xshift=-4,
            text="branches start",
            showarrow=False,
        )
    figure.update_xaxes(title="tokens trained on", tickformat="~s")
    figure.update_yaxes(title=unit)
    return figure


def _turns(figure: Any, report: Report) -> None:
    """A line where longer responses begin (dotted) or a run went back (dashed); grey where that is so of several."""
    runs_at: dict[tuple[float, bool], list[int]] = {}
    for index, run in _rl_runs(report):
        for turn in run.turns:
            between = (turn.after_step + 0.5) * run.settings["updates_per_step"]
            runs_at.setdefault((between, turn.roll_back), []).append(index)
    for (between, roll_back), indices in runs_at.items():
        colour = BRANCH_COLOURS[indices[0] % len(BRANCH_COLOURS)] if len(indices) == 1 else STABLE
        line = {"color": colour, "width": 1, "dash": "dash" if roll_back else "dot"}
        figure.add_vline(x=between, line=line)


def _rl_runs(report: Report) -> list[tuple[int, Run]]:
    return [(index, branch.rl) for index, branch in enumerate(report.branches) if branch.rl and branch.rl.rows]


def _line(
    figure: Any,
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    *,
    colour: str,
    dash: str = "solid",
    opacity: float = 1.0,
    width: float = 2,
    legend: bool = True,
    mode: str = "lines",
) -> None:
    if x:
        figure.add_scatter(
            x=list(x),
            y=list(y),
            name=name,
            mode=mode,
            line={"color": colour, "dash": dash, "width": width},
            marker={"size": 4},
            opacity=opacity,
            showlegend=legend,
            hoverinfo="all" if legend else "skip",
        )


def _figure(height: int) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 16, "t": 36, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        showlegend=True,
        hovermode="closest",
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": INK, "ticks": "outside", "tickcolor": INK}
    figure.update_xaxes(showline=True, **axis)
    figure.update_yaxes(automargin=True, title_standoff=8, **axis)
    return figure
