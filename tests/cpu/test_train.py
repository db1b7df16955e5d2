"""Training on megatron-core over gloo: layouts agree, resume is exact, branches leave the stable stage seamlessly.

One launch of two ranks (`matrix.py`) trains everything; the tests read the run folders.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_octo import checksums, lineage, rundir
from megatron_octo.budget.ledger import read_ledger
from megatron_octo.config.base import to_dict
from megatron_octo.convert.save import find_save
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.convert.torch_dist import Reader
from tests.conftest import REPOSITORY, word_tokenizer
from tests.cpu.matrix import BF16_LAYOUTS, BF16_STEPS, CHANGES, LAYOUTS, PEAK
from tests.cpu.zygote import Zygote
from tests.prepared import BATCH, SEQ_LENGTH, stage

FP32_TOLERANCE = 5e-6  # CONTRIBUTING.md
BF16_TOLERANCE = 5e-3
GOLDEN_TOLERANCE = 1e-6  # two last bits of such a loss: CPUs sum in different orders, and differ by 2.4e-7 at most
LAUNCH_TIMEOUT_S = 500

pytestmark = pytest.mark.timeout(LAUNCH_TIMEOUT_S + 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """Where two ranks have trained everything in `matrix.py`."""
    path = tmp_path_factory.mktemp("matrix")
    zygote.run("tests.cpu.matrix:main", path, log=path / "log", ranks=2, timeout_s=LAUNCH_TIMEOUT_S)
    return path


@pytest.fixture
def metrics(folder: Path):
    """The metrics of a run, by its name."""

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def losses(metrics):
    """The losses of a run, by its name."""
    return lambda name: [row["train/loss"] for row in metrics(name)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_agrees_with_one_rank(layout, metrics):
    reference, rows = metrics("reference"), metrics(layout)
    assert len(rows) == len(reference) == 20
    for ours, theirs in zip(rows, reference, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=FP32_TOLERANCE)
        assert ours["optim/grad_norm"] == pytest.approx(theirs["optim/grad_norm"], rel=1e-5)


def test_the_reference_learns(losses):
    assert losses("reference")[-1] < losses("reference")[0] - 0.3


def test_the_reference_is_golden(losses):
    """A change of numerics is recorded anew, with its reason, in a commit of its own that does not refactor."""
    golden = rundir.read_json(REPOSITORY / "tests" / "golden" / "reference.json")
    assert losses("reference") == pytest.approx(golden["losses"], abs=GOLDEN_TOLERANCE)


def test_bf16_is_near_fp32(losses):
    reference = losses("reference")[:BF16_STEPS]
    assert losses("bf16") == pytest.approx(reference, abs=0.05)
    assert losses("bf16") != reference


@pytest.mark.parametrize(
    ("name", "alone"), [*((f"bf16-{layout}", "bf16") for layout in BF16_LAYOUTS), ("bf16-fsdp2", "bf16-fresh")]
)
def test_a_layout_agrees_with_one_rank_in_bf16(name, alone, losses):
    assert len(losses(name)) == BF16_STEPS
    assert losses(name) == pytest.approx(losses(alone), abs=BF16_TOLERANCE)


@pytest.mark.parametrize(("whole", "resumed", "steps"), [("ten", "ten-resumed", 10), ("reference", "resumed", 20)])
def test_a_run_is_its_half_and_a_resume_and_the_other_half_exactly(whole, resumed, steps, metrics):
    names = ("step", "tokens", "train/loss", "optim/grad_norm")
    assert len(metrics(whole)) == steps
    assert [[row[name] for name in names] for row in metrics(resumed)] == [
        [row[name] for name in names] for row in metrics(whole)
    ]


@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "tp2-sp"])
def test_a_resume_in_the_same_layout_is_exact(layout, losses):
    assert losses(f"{layout}-resumed") == losses(layout)


@pytest.mark.parametrize("change", [*(f"{a}-then-{b}" for a, b in CHANGES.items()), "dp2-then-alone"])
def test_a_resume_in_another_layout_goes_on(change, losses):
    assert losses(change) == pytest.approx(losses("reference"), abs=FP32_TOLERANCE)
    assert losses(change) != losses(change.split("-then-")[0])  # the other layout did run


def test_a_save_of_sharded_weights_is_like_any_other(folder):
    """Under FSDP each rank holds rows of all weights."""
    sharded, whole = (Reader(rundir.step_folder(folder / "runs" / name, 20)) for name in ("fsdp2", "dp2"))
    names = [name for name in list(whole.keys()) if not name.startswith("optimizer.state.param.")]
    assert sorted(sharded.keys()) == sorted(names)
    for name in names:
        torch.testing.assert_close(sharded.read(name), whole.read(name), atol=1e-4, rtol=1e-3)


def test_a_resume_starts_after_the_last_whole_save(folder):
    log = (folder / "log").read_text()
    save = rundir.step_folder(folder / "runs" / "resumed", 10)
    assert f"resumed after step 10 from {save}" in log
    assert f"{folder / 'runs' / 'resumed'} is done: nothing to train" in log


def test_time_goes_on_across_a_resume(metrics):
    times = [row["time_s"] for row in metrics("resumed")]
    assert times == sorted(times)
    assert all(row["throughput/tokens_per_second"] > 0 for row in metrics("resumed"))


def test_decay_starts_at_the_rate_stable_ended_with(metrics):
    stable, decay = metrics("reference"), metrics("decay")
    assert decay[0]["optim/lr"] == stable[-1]["optim/lr"] == PEAK
    rates = [row["optim/lr"] for row in decay]
    assert rates == sorted(rates, reverse=True)
    assert PEAK / 10 < rates[-1] < PEAK / 8


def test_decay_starts_from_the_parents_weights(losses):
    assert losses("decay")[0] < losses("reference")[0] - 0.3


def test_a_branch_at_the_same_rate_is_the_parent_gone_on(metrics):
    """Weights, moments and Adam's step count all come over: on equal sequences the border leaves no trace."""
    whole = [(row["train/loss"], row["optim/grad_norm"]) for row in metrics("uniform")]
    parts = [
        (row["train/loss"], row["optim/grad_norm"])
        for name in ("parent", "child")
        for row in metrics(f"uniform-{name}")
    ]
    assert parts == whole


def test_a_branch_without_the_moments_differs_from_its_second_step_on(losses):
    kept, fresh = losses("uniform-child"), losses("uniform-fresh")
    assert fresh[0] == kept[0]
    assert fresh[1] != kept[1]


def test_rates_are_exact_at_every_step_of_a_branch_and_of_its_resume(metrics):
    batch = BATCH * SEQ_LENGTH
    for name in ("long-first", "long-resumed"):
        rows = metrics(name)
        assert [row["step"] for row in rows] == list(range(1, 11))
        for step, row in enumerate(rows):
            progress = max(0, step - 2) / 8
            assert row["optim/lr"] == pytest.approx(PEAK * (1 - math.sqrt(progress)), rel=1e-12)
            assert row["optim/weight_decay"] == pytest.approx(0.1 * (1 - step / 10), rel=1e-12)
            assert row["tokens"] == (step + 1) * batch


def test_the_optimizer_steps_at_these_rates(folder):
    groups = rundir.read_json(folder / "groups-long.json")  # of the save after step 5
    assert sorted(group["weight_decay"] for group in groups) == [0.0, pytest.approx(0.06, rel=1e-12)]
    assert [group["lr"] for group in groups] == pytest.approx([PEAK * (1 - math.sqrt(2 / 8))] * 2, rel=1e-12)


def test_branches_are_the_same_in_whichever_order_they_run(folder, metrics):
    for kind in ("short", "long"):
        one, other = f"{kind}-first", f"{kind}-second"
        hashes = [lineage.read(folder / "runs" / name).weights_sha256 for name in (one, other)]
        assert hashes[0] == hashes[1]
        assert numbers(metrics(one)) == numbers(metrics(other))
    assert numbers(metrics("short-first")) != numbers(metrics("long-first"))


def test_a_branch_that_was_cut_off_is_the_same_too(folder, metrics):
    assert numbers(metrics("long-resumed")) == numbers(metrics("long-first"))
    hashes = {lineage.read(folder / "runs" / f"long-{name}").weights_sha256 for name in ("first", "resumed")}
    assert len(hashes) == 1


def test_branches_never_write_to_their_parent(folder):
    assert rundir.read_json(folder / "branches.json")["untouched"]


def test_a_branch_goes_on_with_its_parents_random_states_unless_it_takes_weights_alone(folder):
    states = rundir.read_json(folder / "branches.json")["states"]
    assert states["short-first"] == states["long-first"] != states["fresh"]


def test_a_branch_that_reads_on_reads_no_sequence_of_its_parents(folder):
    parent, child = (read_ledger(rundir.step_folder(folder / "runs" / run, 10)) for run in ("reference", "long-first"))
    assert child.phases[0].streams == parent.streams
    used = {stream.prefix: stream.used for stream in parent.streams}
    for stream in child.streams:
        assert stream.blocks[0] == next(each for each in parent.streams if each.prefix == stream.prefix).blocks[0]
    read = sum(stream.used - used[stream.prefix] for stream in child.streams)
    assert read == 10 * BATCH
    assert read_ledger(rundir.step_folder(folder / "runs" / "short-first", 10)).phases[0].streams == ()


def test_lineage_says_which_save_recipe_data_and_code(folder):
    link = lineage.read(folder / "runs" / "short-first")
    assert link.parent
    assert link.parent == lineage.read(rundir.step_folder(folder / "runs" / "reference", 10))
    assert (link.parent.step, link.parent.tokens) == (10, 10 * BATCH * SEQ_LENGTH)
    assert link.code == lineage.code_version()
    assert [name for name, _ in link.data] == ["a", "b"]
    assert link.data == link.parent.data
    assert len({each.recipe_sha256 for each in link.chain()}) == 3


def test_the_ledger_survives_a_change_of_weights(folder, metrics):
    run, batch = folder / "runs" / "reweighed", BATCH * SEQ_LENGTH
    half, whole = (read_ledger(rundir.step_folder(run, step)) for step in (10, 20))
    assert half == read_ledger(rundir.step_folder(folder / "runs" / "reference", 10))
    assert whole.planned_tokens == whole.consumed_tokens == 20 * batch
    assert all(each.planned == each.consumed for each in whole.sources)
    assert [phase.start_sequences for phase in whole.phases] == [0, 10 * BATCH]
    shares = {each.name: each.consumed / batch for each in whole.sources}
    assert shares == pytest.approx({"a": 7 + 3, "b": 3 + 5, "c": 2}, abs=0.3)
    rows = metrics("reweighed")
    assert [row["train/loss"] for row in rows[:10]] == [row["train/loss"] for row in metrics("reference")[:10]]
    assert rows[10]["train/loss"] != metrics("reference")[10]["train/loss"]
    assert "data/c/epochs" not in rows[9]
    for each in whole.sources:
        assert rows[-1][f"data/{each.name}/consumed_tokens"] == each.consumed
        assert rows[-1][f"data/{each.name}/planned_tokens"] == each.planned
    assert rundir.read_json(run / "config.json")["data"]["sources"][2]["name"] == "c"


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what a clock says, and the memory of the process."""
    timed = ("time", "throughput", "memory")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def test_an_import_brings_the_weights(losses):
    assert losses("imported")[0] == losses("reference")[0]


def test_the_licence_of_a_base_reaches_the_export_of_a_branch(folder, tmp_path):
    save = find_save(folder / "runs" / "of-imported")
    assert checksums.faults(save) == []
    out = to_hf(save, tmp_path / "out", word_tokenizer(tmp_path / "words"), verify=False)
    assert (out / "LICENSE.txt").read_text() == "terms"
    assert "Llama 3.2 Community License" in (out / "NOTICE").read_text()
    card = (out / "README.md").read_text()
    assert "Built with Llama" in card and "stable run: imported" in card and "branch: of-imported" in card


def test_the_ledger_counts_what_was_read(folder):
    run = folder / "runs" / "reference"
    half, whole = (rundir.read_json(rundir.step_folder(run, step) / "ledger.json") for step in (10, 20))
    assert half["planned_tokens"] == whole["planned_tokens"] == whole["consumed_tokens"] == 20 * BATCH * SEQ_LENGTH
    assert half["consumed_tokens"] == 10 * BATCH * SEQ_LENGTH
    shares = [source["consumed"] / whole["consumed_tokens"] for source in whole["sources"]]
    assert shares == pytest.approx([0.7, 0.3], abs=0.02)
    assert all(source["planned"] == source["consumed"] for source in whole["sources"])


def test_every_layout_keeps_the_same_ledger(folder):
    ledgers = [
        (rundir.step_folder(folder / "runs" / name, 20) / "ledger.json").read_text() for name in ("reference", *LAYOUTS)
    ]
    assert len(set(ledgers)) == 1


def test_the_optimizers_numbers_are_the_settings_and_norms_do_not_decay(folder):
    ours = stage(folder, "x").optimizer
    groups = rundir.read_json(folder / "groups.json")
    assert sorted(group["weight_decay"] for group in groups) == [0.0, ours.weight_decay]
    for group in groups:
        assert group["betas"] == [ours.beta1, ours.beta2]
        assert group["eps"] == ours.eps
        assert group["lr"] == PEAK
        assert group["step"] == 21  # the parent's one step and 20 of its own


def test_a_save_holds_what_conversion_and_people_need(folder):
    run = folder / "runs" / "tp2-sp"
    save = rundir.step_folder(run, 20)
    assert rundir.read_json(save / "model.json") == to_dict(stage(folder, "x").model)
    assert rundir.read_json(save / "config.json") == rundir.read_json(run / "config.json")
    assert rundir.read_json(save / "state.json")["consumed_sequences"] == 20 * BATCH
    assert (run / "checkpoints" / "latest").read_text() == "20\n"
    assert {path.name for path in run.iterdir()} >= {
        "config.json",
        "environment.json",
        "lineage.json",
        "plan.txt",
        "metrics.jsonl",
        "tensorboard",
        "DONE",
    }


def test_old_saves_go_and_the_last_stay(folder):
    names = sorted(path.name for path in (folder / "runs" / "decay" / "checkpoints").glob("step_*"))
    assert names == ["step_00000015", "step_00000020"]


def test_lineage_tells_the_descent_with_hashes(folder):
    run = folder / "runs" / "decay"
    chain = lineage.read(run).chain()
    assert [(link.name, link.step, link.tokens) for link in chain] == [
        ("base", 1, BATCH * SEQ_LENGTH),
        ("reference", 20, 20 * BATCH * SEQ_LENGTH),
        ("decay", 20, 20 * BATCH * SEQ_LENGTH),
    ]
    assert chain[-1].weights_sha256 == rundir.sha256_folder(rundir.step_folder(run, 20), "*.distcp")


def test_weights_have_the_same_keys_in_every_layout(folder):
    from torch.distributed.checkpoint import FileSystemReader

    def keys(name: str) -> dict[str, Any]:
        metadata = FileSystemReader(rundir.step_folder(folder / "runs" / name, 20)).read_metadata()
        return {
            key: tuple(entry.size)
            for key, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "size") and not key.startswith("optimizer.")
        }

    assert keys("reference") == {
        "embedding.word_embeddings.weight": (64, 32),
        "decoder.final_layernorm.weight": (32,),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (4, 32),
        "decoder.layers.self_attention.linear_qkv.weight": (4, 64, 32),
        "decoder.layers.self_attention.linear_proj.weight": (4, 32, 32),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (4, 32),
        "decoder.layers.mlp.linear_fc1.weight": (4, 128, 32),
        "decoder.layers.mlp.linear_fc2.weight": (4, 32, 64),
    }
    assert all(keys(name) == keys("reference") for name in LAYOUTS)
