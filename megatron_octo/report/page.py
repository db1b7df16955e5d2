"""One HTML page that holds everything it needs, and report.json, its numbers. Reads run folders only.

`octo report` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_octo import __version__, console, rundir
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.evaluate.run import Scores
from megatron_octo.report import plots
from megatron_octo.report.load import Report, Run, load
from megatron_octo.report.numbers import (
    Node,
    descent,
    interval,
    numbers,
    percent,
    points,
    rl_numbers,
    run_numbers,
    verdict,
)
from megatron_octo.report.source import Source, of_pipeline
from megatron_octo.report.style import STYLE

PAGE, NUMBERS = "report.html", "report.json"
HASH_CHARACTERS = 8
NOTHING = "&ndash;"
KINDS = {"base": "base", "import": "imported", "train": "mid-training", "rl": "RL"}
PRINT_SCRIPT = """
addEventListener("beforeprint", () => document.querySelectorAll(".js-plotly-plot").forEach(
  plot => Plotly.relayout(plot, {autosize: false, width: plot.closest(".multiples") ? 310 : 640})));
addEventListener("afterprint", () => document.querySelectorAll(".js-plotly-plot").forEach(
  plot => Plotly.relayout(plot, {autosize: true, width: null})));
"""


def write_report(pipeline: PipelineConfig, output: Path) -> Path:
    """Write report.html and report.json of a pipeline into the folder `output`; returns the page's path.

    What has not run yet is named on the page.
    """
    return write(of_pipeline(pipeline), output)


def write(source: Source, output: Path) -> Path:
    """As `write_report`, for any source."""
    report = load(source)
    rundir.write_json(output / NUMBERS, numbers(report))
    rundir.write_atomic(output / PAGE, page(report))
    return output / PAGE


def page(report: Report) -> str:
    """The page as HTML."""
    from plotly.offline import get_plotlyjs

    sections = (
        _accuracy(report),
        _section("Descent", _tree(descent(report))),
        _training(report),
        _rl(report),
        _times(report),
        _settings(report),
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.title)}: report</title>
<style>{STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
<header>
<p class="kicker">Stable, then decay, then RL</p>
<h1>{escape(report.title)}</h1>
<p class="verdict">{escape(verdict(report))}</p>
{_notes(report)}
</header>
{"".join(sections)}
<footer>megatron_octo {escape(__version__)}. Intervals are 95% bootstrap intervals with problems as clusters.</footer>
</main>
<script>{PRINT_SCRIPT}</script>
</body>
</html>
"""


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<div class="note"><strong>Not there yet</strong><ul>{items}</ul></div>'


def _accuracy(report: Report) -> str:
    scored = [each for branch in report.branches for each in (branch.before, branch.after) if each]
    if not scored:
        return _section("Right answers", _missing("No branch has been scored yet: run `octo evaluate`."))
    rows = [_score_row("stable", report.stable_scores, None, None)] if report.stable_scores else []
    rows += [_score_row(branch.train.label, branch.before, branch.after, branch.gain) for branch in report.branches]
    one = scored[0]
    caption = (
        f"Task {escape(one.task)}: {one.num_problems:,} problems, {one.samples_per_problem} answers each, temperature "
        f"{one.temperature:g}. Shares in % [95% interval]; change in points, paired over problems."
    )
    columns = ("model", "before RL", "after RL", "change by RL", "boxed, %", "mean tokens", "cut off, %")
    figure = _plot(plots.accuracy(report), "Right answers before and after RL")
    return _section("Right answers", figure + _table(columns, rows, caption))


def _score_row(
    label: str, before: Scores | None, after: Scores | None, gain: tuple[float, float, float] | None
) -> list[str]:
    both = [each for each in (before, after) if each]
    shares = [
        f"{percent(each.accuracy)} {interval(each.accuracy_interval)}" if each else NOTHING for each in (before, after)
    ]
    details = (
        [percent(each.boxed_share) for each in both],
        [f"{each.mean_tokens:.1f}" for each in both],
        [percent(each.truncated_share) for each in both],
    )
    change = points(gain) if gain else NOTHING
    return [escape(label), *shares, change, *(" &rarr; ".join(values) or NOTHING for values in details)]


def _tree(nodes: Sequence[Node]) -> str:
    if not nodes:
        return _missing("No run has saved weights yet.")
    return f'<div class="scroll"><ul class="tree">{"".join(map(_branchlet, nodes))}</ul></div>'


def _branchlet(node: Node) -> str:
    facts = []
    if node.step is not None:
        facts.append(f"step {node.step:,}")
    if node.tokens:
        facts.append(f"{_count(node.tokens)} tokens")
    digest = node.weights_sha256[:HASH_CHARACTERS]
    box = (
        f'<div class="box {escape(node.kind)}"><span class="kind">{escape(KINDS.get(node.kind, node.kind))}</span>'
        f"<b>{escape(node.name)}</b>"
        + "".join(f"<span>{fact}</span>" for fact in facts)
        + (f'<code title="SHA-256 of the weights">{escape(digest)}</code>' if digest else "")
        + "</div>"
    )
    children = "".join(map(_branchlet, node.children))
    return f"<li>{box}{f'<ul>{children}</ul>' if children else ''}</li>"


def _training(report: Report) -> str:
    runs = [run for run in (report.stable, *(branch.train for branch in report.branches)) if run]
    if not any(run.rows for run in runs):
        return _section("Mid-training", _missing("No training run has logged a step yet."))
    figures = _grid(
        _plot(plots.loss(report), "Training loss over tokens"), _plot(plots.rate(report), "Learning rate over tokens")
    )
    rows = []
    for run in runs:
        row = run_numbers(run)
        rows.append(
            [
                escape(run.label),
                escape(row["status"]),
                f"{row['steps']:,}",
                f"{row['tokens']:,}",
                _number(row["final_loss"], ".3f"),
                _number(row["tokens_per_second"], ",.0f"),
                _time(row["seconds"]),
            ]
        )
    columns = ("run", "state", "steps", "tokens", "final loss", "tokens/s", "time")
    caption = "Final loss: mean over the last twentieth of the steps. Tokens/s: median over the steps."
    return _section("Mid-training", figures + _table(columns, rows, caption))


def _rl(report: Report) -> str:
    runs = [(branch, branch.rl) for branch in report.branches if branch.rl and branch.rl.rows]
    if not runs:
        return _section("Reinforcement learning", _missing("RL has not run yet: run `octo rl`."))
    large = [_plot(plots.over_updates(report, panel), panel.title) for panel in plots.RL_AXES]
    small = [_plot(plots.over_updates(report, panel, small=True), panel.title) for panel in plots.rl_panels(report)]
    figures = _grid(*large) + _grid(*small, kind="multiples") + _turns([run for _, run in runs])
    rows = []
    for branch, run in runs:
        row = rl_numbers(run)
        rows.append(
            [
                escape(branch.train.label),
                escape(row["status"]),
                f"{row['steps']:,}",
                _change(row["first_reward"], row["last_reward"], "+.2f"),
                _change(row["first_length"], row["last_length"], ".1f"),
                _number(row["largest_vllm_kl"], ".1e"),
                _time(row["seconds"]),
            ]
        )
    columns = ("branch", "state", "rollout steps", "mean reward", "mean tokens", "largest |vllm_kl|", "time")
    caption = (
        "First &rarr; last step. vllm_kl is how far the policy that samples is from the one that is trained: above "
        "the dotted line, which is the run's own bound, its watch takes them for different weights."
    )
    return _section("Reinforcement learning", figures + _table(columns, rows, caption))


def _turns(runs: Sequence[Run]) -> str:
    """What the vertical lines of RL's figures mean, and which there are."""
    if not any(run.turns for run in runs):
        return ""
    items = "".join(f"<li>{escape(run.label)}: {escape(turn.text)}</li>" for run in runs for turn in run.turns)
    return (
        '<div class="caption">Vertical lines: dotted where longer responses begin, dashed where a run went back.'
        f"<ul>{items}</ul></div>"
    )


def _times(report: Report) -> str:
    if not report.costs:
        return _section("Time", _missing("No times of stages: `octo pipeline` writes them."))
    total = sum(each.seconds for each in report.costs)
    rows = [
        [
            escape(each.stage),
            _time(each.seconds),
            f"{100 * each.seconds / total:.0f}%" if total else NOTHING,
            f"{each.peak_gib:.1f}",
        ]
        for each in report.costs
    ]
    peak = max(each.peak_gib for each in report.costs)
    rows.append(["<b>all</b>", f"<b>{_time(total)}</b>", "100%", f"{peak:.1f}"])
    columns = ("stage", "time", "share", "peak memory, GiB")
    return _section(
        "Time",
        _plot(plots.costs(report.costs), "Time of each stage") + _table(columns, rows, "All attempts together."),
    )


def _settings(report: Report) -> str:
    runs = [report.stable, *(branch.train for branch in report.branches), *(branch.rl for branch in report.branches)]
    folded = [
        f"<details><summary>{escape(run.name)}</summary>"
        f"<pre>{escape(json.dumps(run.settings, indent=2))}</pre></details>"
        for run in runs
        if run
    ]
    return _section("Settings", "".join(folded))


def _section(title: str, body: str) -> str:
    return f'<section id="{title.lower().replace(" ", "-")}"><h2>{title}</h2>{body}</section>\n'


def _missing(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _grid(*figures: str, kind: str = "grid") -> str:
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _plot(figure: Any, title: str) -> str:
    html = figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False})
    return f'<figure role="img" aria-label="{escape(title)}"><figcaption>{escape(title)}</figcaption>{html}</figure>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table; cells and caption are HTML, column names are text."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="caption">{caption}</p>'
    )


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _change(first: float | None, last: float | None, form: str) -> str:
    return NOTHING if first is None or last is None else f"{first:{form}} &rarr; {last:{form}}"


def _time(seconds: float | None) -> str:
    return NOTHING if seconds is None else console.duration(seconds)


def _count(value: float) -> str:
    """1,597,440 as `1.6M`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
