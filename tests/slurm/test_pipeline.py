"""The miniature, made small, through pipeline.sh: every stage is a job, and none is a stub."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.launch.pipeline import stages
from megatron_octo.rl.collect import read_metrics
from megatron_octo.rl.run import has_gpu
from tests.conftest import REPOSITORY
from tests.cpu.test_pipeline_killed import NUM_STEPS, small_road
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import output

RL_STEPS = 2


@pytest.fixture
def road(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    """Data, base, stable, one branch, its RL, both evaluations, report."""
    monkeypatch.setenv("OCTO_RUNS", str(checkout / "runs"))
    whole = runpy.run_path(str(REPOSITORY / "recipes" / "miniature.py"))["road"]("tiny", branches=("long",))
    export = f"step_{NUM_STEPS:08d}"
    rl = replace(
        whole.rl[0],
        model=whole.rl[0].model.with_name(export),
        num_steps=RL_STEPS,
        prompts_per_step=4,
        save_every_steps=1,
    )
    return replace(small_road(whole), rl=(rl,), evaluate_after=replace(whole.evaluate_after, samples_per_problem=1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(has_gpu(), reason="its shapes are for machines without a GPU")
def test_every_stage_of_the_road_is_a_job_that_ends_well(slurm: Cluster, checkout: Path, road: PipelineConfig):
    rundir.write_json(checkout / "road.json", to_dict(road))
    words = ["--nodes=1", "--gpus-per-node=1", "road.json"]
    said = slurm(checkout / "slurm" / "pipeline.sh", *words, cwd=checkout).splitlines()
    jobs = {
        name: job for job, name, *_ in (line.removeprefix("job ").split("  ") for line in said if line[:4] == "job ")
    }
    assert len(jobs) == len(list(stages(road)))
    for name, job in jobs.items():
        state = slurm.wait_end(job, 900)
        assert (state, slurm.field(job, "Restarts")) == ("COMPLETED", "0"), f"{name}: {output(checkout, job)[-3000:]}"
    assert all(stage.done for stage in stages(road) if stage.outputs)
    assert (rundir.run_folder(road.name) / "report" / "report.html").exists()
    (rl,) = road.rl
    assert [row["step"] for row in read_metrics(rl.output / "metrics.jsonl")] == [1, 2]
    descent = lineage.read(rl.output / "hf").chain()
    assert [each.kind for each in descent] == ["base", "import", "train", "train", "export", "rl"]
