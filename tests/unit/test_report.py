"""The report of a finished, a half finished and an empty pipeline."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_octo import lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.rl import LongerResponses
from megatron_octo.errors import BadInput
from megatron_octo.evaluate.run import read_scores
from megatron_octo.evaluate.statistics import paired_difference
from megatron_octo.report import plots
from megatron_octo.report.load import Report, load
from megatron_octo.report.numbers import descent, numbers, points, verdict
from megatron_octo.report.page import page, write_report
from megatron_octo.report.source import of_pipeline, of_runs
from tests import finished_runs

SECTIONS = ("right-answers", "descent", "mid-training", "reinforcement-learning", "time", "settings")


class Page(HTMLParser):
    """What a page holds: ids, texts, tags that are open, addresses that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data + " "


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PipelineConfig]:
    """The miniature, finished; for tests that leave its folders alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTO_RUNS", str(tmp_path_factory.mktemp("finished") / "runs"))
        config = finished_runs.pipeline()
        finished_runs.write_runs(config)
        yield config


@pytest.fixture
def pipeline(finished: PipelineConfig, runs: Path) -> PipelineConfig:
    """A copy of it whose folders a test may change."""
    shutil.copytree(finished.base_folder.parent.parent, runs)
    return finished_runs.pipeline()


@pytest.fixture
def report(finished: PipelineConfig) -> Report:
    """What its folders say."""
    return load(of_pipeline(finished))


def test_page_has_every_section_loads_nothing_and_is_whole_html(finished: PipelineConfig, tmp_path: Path) -> None:
    path = write_report(finished, tmp_path / "out")
    text = path.read_text()
    found = Page(text)
    assert [each for each in found.ids if each in SECTIONS] == list(SECTIONS)
    assert found.open == []
    assert found.loads == []
    assert not re.search(r"@import|url\(", text[: text.index("<script>")])
    assert text.count("* plotly.js v") == 1
    assert "Not there yet" not in found.text
    assert {each.name for each in path.parent.iterdir()} == {"report.html", "report.json"}


def test_page_shows_the_numbers_of_the_scores(finished: PipelineConfig, report: Report) -> None:
    shown = Page(page(report)).text
    branch, rl = finished.branches[1], finished.rl[1]
    before = read_scores(rundir.run_folder(branch.name) / "scores" / "heldout")
    after = read_scores(rl.output / "scores" / "heldout")
    for scores in (before, after):
        low, high = scores.accuracy_interval
        assert f"{100 * scores.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in shown
    assert points(paired_difference(before.per_problem, after.per_problem)) in shown
    assert "400 problems, 4 answers each, temperature 1" in shown
    assert f"{before.mean_tokens:.1f} \u2192 {after.mean_tokens:.1f}" in shown


def test_verdict_names_the_best_branch_its_lead_and_its_gain(report: Report) -> None:
    by_label = {branch.train.label: branch for branch in report.branches}
    long, short = by_label["long"].after, by_label["short"].after
    assert long is not None
    assert short is not None
    sentence = verdict(report)
    assert sentence.startswith(f"After RL, branch long is the best reasoner: {100 * long.accuracy:.1f}% [")
    assert f"{points(paired_difference(short.per_problem, long.per_problem))} points ahead of short" in sentence
    assert "chance" not in sentence
    assert by_label["long"].gain is not None
    assert points(by_label["long"].gain) in sentence


def test_verdict_says_when_the_lead_may_be_chance(pipeline: PipelineConfig) -> None:
    for rl, accuracy in zip(pipeline.rl, (0.60, 0.61, 0.20), strict=True):
        finished_runs.write_scores(rl.output / "scores" / "heldout", accuracy, tokens=30, seed=len(rl.name))
    assert "a lead that may be chance" in verdict(load(of_pipeline(pipeline)))


def test_numbers_agree_with_the_inputs(finished: PipelineConfig, report: Report, tmp_path: Path) -> None:
    path = write_report(finished, tmp_path / "out").with_name("report.json")
    found = json.loads(path.read_text())
    assert found == json.loads(json.dumps(numbers(report)))
    assert found["stable"]["tokens"] == finished.stable.budget.train_tokens
    branch = found["branches"][2]
    rows = [json.loads(line) for line in (rundir.run_folder(branch["name"]) / "metrics.jsonl").read_text().splitlines()]
    assert branch["final_loss"] == pytest.approx(sum(row["train/loss"] for row in rows[-24:]) / 24)
    rl_rows = [json.loads(line) for line in (finished.rl[2].output / "metrics.jsonl").read_text().splitlines()]
    assert branch["rl"]["largest_vllm_kl"] == max(abs(row["rl/vllm_kl"]) for row in rl_rows)
    assert branch["rl"]["last_reward"] == rl_rows[-1]["rl/reward_mean"]
    times = {each["stage"]: each["seconds"] for each in found["stages"]}
    assert times["train miniature-stable"] == 180.0  # both attempts
    assert found["seconds"] == pytest.approx(sum(times.values()))


def test_branches_go_on_where_the_stable_stage_stopped(finished: PipelineConfig, report: Report) -> None:
    border = finished.stable.budget.train_tokens
    figure = plots.rate(report)
    stable, *branches = figure.data
    assert stable.x[-1] == border
    for branch in branches:
        assert branch.x[0] == border + finished.stable.batch_tokens
        assert branch.x[-1] == border + finished.branches[0].budget.train_tokens
        assert branch.y[0] == pytest.approx(stable.y[-1], rel=1e-3)


def test_branch_that_left_an_earlier_save_starts_at_its_tokens(finished: PipelineConfig) -> None:
    start = replace(finished.branches[0].start, step=390)  # type: ignore[type-var]
    branches = (replace(finished.branches[0], start=start), *finished.branches[1:])
    report = load(of_pipeline(replace(finished, branches=branches)))
    assert report.branches[0].train.start_tokens == 390 * finished.stable.batch_tokens


def test_bars_show_each_interval(report: Report) -> None:
    before, after = plots.accuracy(report).data
    assert list(before.x) == ["stable", "short", "long", "hybrid"]
    assert list(after.x) == ["short", "long", "hybrid"]
    scores = report.branches[0].after
    assert scores is not None
    assert after.y[0] == pytest.approx(100 * scores.accuracy)
    assert after.y[0] + after.error_y.array[0] == pytest.approx(100 * scores.accuracy_interval[1])
    assert after.y[0] - after.error_y.arrayminus[0] == pytest.approx(100 * scores.accuracy_interval[0])


def test_every_axis_of_every_figure_says_what_it_shows(report: Report) -> None:
    rl = [plots.over_updates(report, panel) for panel in (*plots.RL_AXES, *plots.rl_panels(report))]
    for figure in (plots.loss(report), plots.rate(report), *rl):
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
    assert "%" in plots.accuracy(report).layout.yaxis.title.text
    assert "seconds" in plots.costs(report.costs).layout.xaxis.title.text


def test_every_curve_of_rl_has_a_figure_with_a_line_a_branch(report: Report) -> None:
    small = plots.rl_panels(report)
    assert [*small] == [*plots.RL_PANELS], "the runs have no validation, and all else"
    for panel in (*plots.RL_AXES, *small):
        figure = plots.over_updates(report, panel, small=panel in small)
        lines = figure.data[:3]
        assert [line.name for line in lines] == ["short", "long", "hybrid"]
        assert len({(line.line.color, line.line.dash) for line in lines}) == 3
        assert lines[1].x == tuple(range(2, 61, 2)), "two updates a rollout step"
        assert figure.layout.xaxis.title.text == "optimizer updates" and figure.layout.xaxis.range == (0, 61)
        assert figure.layout.showlegend is (panel in plots.RL_AXES)
        assert not figure.layout.shapes
        run = report.branches[1].rl
        assert run is not None
        values = [row[panel.metric] for row in run.rows]
        assert list(lines[1].y) == ([abs(value) for value in values] if panel.metric == "rl/vllm_kl" else values)
        assert (figure.layout.yaxis.type == "log") is (panel.metric == "rl/vllm_kl") is (len(figure.data) == 4)
    shown = Page(page(report)).text
    assert all(panel.title in shown for panel in (*plots.RL_AXES, *small))
    assert "went back" not in shown


def test_each_validation_set_has_its_own_figure(pipeline: PipelineConfig) -> None:
    path = pipeline.rl[1].output / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scored = [{**row, "valid/MATH500/accuracy": 0.5} if row["step"] % 4 == 0 else row for row in rows]
    finished_runs.write_lines(path, scored)
    report = load(of_pipeline(pipeline))
    panel = plots.rl_panels(report)[0]
    assert (panel.metric, panel.title) == ("valid/MATH500/accuracy", "Right answers: MATH500")
    (line,) = plots.over_updates(report, panel).data
    assert (line.name, line.x) == ("long", (8, 16, 24, 32, 40, 48, 56))


def test_the_bound_on_vllm_kl_is_the_one_that_the_watch_used(pipeline: PipelineConfig) -> None:
    panel = next(each for each in plots.RL_PANELS if each.limit)

    def bounds() -> list[tuple[float, ...]]:
        return [line.y for line in plots.over_updates(load(of_pipeline(pipeline)), panel).data if line.name == "limit"]

    assert bounds() == [(1e-3, 1e-3)]
    for rl, bound in zip(pipeline.rl, ({"rl/most_vllm_kl": 0.02}, {"rl/most_vllm_kl": 0.02}, {}), strict=True):
        path = rl.output / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        without = [{name: value for name, value in row.items() if name != panel.limit} for row in rows]
        finished_runs.write_lines(path, [{**row, **bound} for row in without])
    assert bounds() == [(0.02, 0.02)], "a GPU's; a run that has none draws none"


def test_longer_responses_and_roll_backs_are_marked(pipeline: PipelineConfig) -> None:
    for rl, borders in zip(pipeline.rl, ((), (10, 20), (10,)), strict=True):
        longer = tuple(LongerResponses(after_step=step, max_response_tokens=1000 + step) for step in borders)
        config = replace(rl, longer_responses=longer, max_tokens_per_gpu=2048)
        rundir.write_json(rl.output / "config.json", to_dict(config))
    back = {"step": 9, "to": 5, "what": "vllm_kl is 0.5 & not within 0.001"}
    rundir.write_json(pipeline.rl[0].output / "roll_backs.json", [back])
    path = pipeline.rl[1].output / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))  # the second border is not reached
    report = load(of_pipeline(pipeline))

    for panel in (*plots.RL_AXES, *plots.rl_panels(report)):
        lines = plots.over_updates(report, panel).layout.shapes
        assert [(each.x0, each.line.dash, each.line.color) for each in lines] == [
            (11, "dash", plots.BRANCH_COLOURS[0]),
            (21, "dot", plots.STABLE),  # of two runs
        ]
    shown = Page(page(report)).text
    assert "short: back from step 9 to 5 (10 updates): vllm_kl is 0.5 & not within 0.001" in shown
    assert all(f"{each}: up to 1,010 tokens after step 10 (20 updates)" in shown for each in ("long", "hybrid"))
    assert "1,020" not in shown
    assert numbers(report)["branches"][0]["rl"]["turns"][0]["after_step"] == 5


def test_a_long_run_of_rl_is_smoothed_over_its_faint_steps(pipeline: PipelineConfig) -> None:
    path = pipeline.rl[0].output / "metrics.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    steps = [{"step": step, "rl/updates": 2 * step, "rl/accuracy": step % 2} for step in range(1, 201)]
    finished_runs.write_lines(path, [{**row, **each} for each in steps])
    faint, smooth = plots.over_updates(load(of_pipeline(pipeline)), plots.RL_AXES[0]).data[:2]
    assert (faint.opacity, smooth.opacity, faint.showlegend) == (plots.RAW_OPACITY, 1, False)
    assert max(faint.y) - min(faint.y) == 1 and max(smooth.y) - min(smooth.y) < 0.2


def test_descent_is_one_tree_from_base_to_rl(report: Report) -> None:
    (base,) = descent(report)
    assert (base.kind, [each.kind for each in base.children]) == ("base", ["import"])
    (stable,) = base.children[0].children
    assert (stable.name, stable.step, stable.tokens) == ("miniature-stable", 1560, 1_597_440)
    assert [each.name for each in stable.children] == [f"miniature-decay-{b}" for b in ("short", "long", "hybrid")]
    assert [each.children[0].name for each in stable.children] == [
        f"miniature-rl-{b}" for b in ("short", "long", "hybrid")
    ]
    assert "f1f1f1f1" in page(report)


def test_an_export_is_found_though_its_name_begins_with_that_of_its_base(runs: Path) -> None:
    config = finished_runs.pipeline()
    finished_runs.write_runs(config, rl=False)
    branch = config.branches[0]
    (export,) = (runs / branch.name / "hf").iterdir()
    lineage.write(export.with_name("step_00000001"), replace(lineage.read(export), step=1))
    export.rename(export.with_name(f"Llama-3.2-{branch.name}-{export.name}"))
    found = load(of_pipeline(config)).branches[0].train.descent
    assert found is not None and (found.kind, found.step) == ("export", branch.num_steps)


def test_what_has_not_run_is_named_and_does_not_fail(runs: Path) -> None:
    config = finished_runs.pipeline()
    empty = load(of_pipeline(config))
    assert verdict(empty) == "No branch has been scored yet."
    found = Page(page(empty))
    assert [each for each in found.ids if each in SECTIONS] == list(SECTIONS)
    assert "Training of stable has not run yet" in found.text
    assert "RL has not run yet" in found.text
    finished_runs.write_runs(config, rl=False)
    half = load(of_pipeline(config))
    assert verdict(half).startswith("Before RL, branch short is the best reasoner")
    shown = Page(page(half)).text
    assert "RL of branch long has not run yet" in shown
    assert "Training of stable has not run yet" not in shown


def test_run_that_goes_on_is_said_to(pipeline: PipelineConfig) -> None:
    (pipeline.rl[0].output / "DONE").unlink()
    path = pipeline.rl[0].output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:20])  # the line that is being written
    report = load(of_pipeline(pipeline))
    assert "RL of branch short is not finished: step 7 of 30." in report.notes


def test_step_made_again_after_a_restart_counts_once(pipeline: PipelineConfig) -> None:
    path = rundir.run_folder(pipeline.stable.name) / "metrics.jsonl"
    again = {**json.loads(path.read_text().splitlines()[99]), "train/loss": 123.0}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    report = load(of_pipeline(pipeline))
    assert report.stable is not None
    steps, losses = report.stable.curve("train/loss", "step")
    assert steps == list(range(1, 1561))
    assert losses[99] == 123.0


def test_broken_line_in_the_middle_is_refused_by_name(pipeline: PipelineConfig) -> None:
    path = rundir.run_folder(pipeline.stable.name) / "metrics.jsonl"
    path.write_text("{}\nnonsense\n" + path.read_text())
    with pytest.raises(BadInput, match=r"metrics\.jsonl:2 is not JSON"):
        load(of_pipeline(pipeline))


def test_scores_of_other_problems_are_not_paired(pipeline: PipelineConfig) -> None:
    finished_runs.write_scores(pipeline.rl[0].output / "scores" / "heldout", 0.9, tokens=9, seed=0, problems_sha256="q")
    report = load(of_pipeline(pipeline))
    assert report.branches[0].gain is None
    assert any("other problems" in note for note in report.notes)
    assert "points ahead" not in verdict(report)


def test_names_are_text_and_not_html(pipeline: PipelineConfig, report: Report) -> None:
    nasty = "<script>alert(1)</script>"
    train = replace(report.branches[0].train, name=nasty, label=nasty, settings={"name": nasty})
    branches = (replace(report.branches[0], train=train), *report.branches[1:])
    text = page(replace(report, title=nasty, branches=branches, notes=(nasty,)))
    assert nasty not in text
    assert Page(text).text.count(nasty) >= 4


def test_separate_runs_make_the_same_report(finished: PipelineConfig, report: Report) -> None:
    names = [finished.stable.name, *(each.name for each in (*finished.branches, *finished.rl))]
    found = load(of_runs([rundir.run_folder(name) for name in names]))
    assert found.branches == report.branches
    assert found.stable == report.stable
    assert verdict(found) == verdict(report)


def test_runs_that_do_not_belong_together_are_refused(finished: PipelineConfig, tmp_path: Path) -> None:
    rl = finished.rl[0].output
    with pytest.raises(BadInput, match="starts from none of the runs given"):
        of_runs([rundir.run_folder(finished.stable.name), rl])
    with pytest.raises(BadInput, match="no such file"):
        of_runs([tmp_path])


def test_smoothing_keeps_a_constant_and_thinning_keeps_the_ends() -> None:
    assert plots.smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    assert plots.smoothed([1.0]) == [1.0]
    values = [float(n) for n in range(5001)]
    kept = plots.thinned(values)
    assert len(kept) <= plots.MAX_POINTS + 1
    assert (kept[0], kept[-1]) == (0.0, 5000.0)
    assert plots.thinned([]) == []
