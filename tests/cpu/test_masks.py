"""Attention cut at documents and loss on answers only: against megatron's own dense masks, against documents run
alone, against slow references, and equal in every layout.

One launch of two ranks (`masks.py`) trains and computes; the tests read the run folders.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_octo import rundir
from megatron_octo.config.data import MixtureConfig, SourceConfig
from megatron_octo.data.borders import cut_at_documents
from megatron_octo.data.loader import build_dataset
from megatron_octo.data.mixture import read_mixture
from tests.cpu.masks import CUT_LAYOUTS, SPARSE_BATCH, SPARSE_LAYOUTS, SPARSE_STEPS, STEPS, write_marks
from tests.cpu.zygote import Zygote
from tests.prepared import EOS, VOCAB, write_documents, write_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed: make setup")

FP32_TOLERANCE = 5e-6  # CONTRIBUTING.md
LOGIT_TOLERANCE = 1e-5
LAUNCH_TIMEOUT_S = 400

pytestmark = pytest.mark.timeout(LAUNCH_TIMEOUT_S + 60)


# ---- where documents meet


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 24), st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_borders_are_those_of_megatrons_dense_mask(rows, length, seed, share):
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    rng = np.random.default_rng(seed)
    ids = np.where(rng.random((rows, length)) < share, EOS, rng.integers(3, VOCAB, (rows, length)))
    tokens = torch.from_numpy(ids)
    batch = cut_at_documents({"tokens": tokens, "labels": tokens + 1}, EOS)

    theirs = [_get_ltor_masks_and_position_ids(row, EOS, True, True, False, True) for row in tokens]
    assert torch.equal(batch["position_ids"], torch.cat([positions for _, _, positions in theirs])[None])
    borders = batch["cu_seqlens"]
    assert borders[0] == 0
    assert borders[-1] == rows * length
    assert batch["max_seqlen"] == borders.diff().max() == batch["position_ids"].max() + 1
    document = torch.repeat_interleave(torch.arange(len(borders) - 1), borders.diff())
    seen = (document[:, None] == document) & torch.ones(rows * length, rows * length).tril().bool()
    assert torch.equal(seen, ~torch.block_diag(*(mask[0] for mask, _, _ in theirs)).bool() & _same_row(rows, length))
    assert torch.equal(batch["labels"], tokens.reshape(1, -1) + 1)


def _same_row(rows: int, length: int) -> Any:
    return torch.block_diag(*[torch.ones(length, length)] * rows).bool()


# ---- which tokens count


FIRST = 3  # ids below are control ids


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=30),
    seq_length=st.integers(2, 40),
    seed=st.integers(0, 2**31),
    sequences=st.integers(1, 60),
)
def test_the_labels_that_count_are_the_marked_ones(lengths, seq_length, seed, sequences, tmp_path_factory):
    """Every token of the corpus has an id of its own, so a label says itself whether it is marked."""
    folder = tmp_path_factory.mktemp("marks")
    rng = np.random.default_rng(seed)
    ends = np.cumsum([FIRST, *lengths]).tolist()
    documents = [list(range(start, end)) for start, end in itertools.pairwise(ends)]
    marks = rng.random(ends[-1]) < 0.4
    half = len(documents) // 2
    tokenizer = write_tokenizer(folder / "tokenizer")
    shards = {"all": [documents[:half]], "answers": [documents[half:-1], documents[-1:]]}
    for name, parts in shards.items():
        write_marks(write_documents(folder / name, tokenizer, parts, ends[-1]), lambda ids: marks[ids])
    marks[: documents[half][0]] = True  # the first source learns from all its tokens, marked or not

    mixture = read_mixture(
        MixtureConfig(
            sources=tuple(SourceConfig(name=name, path=folder / name, weight=0.5, loss=name) for name in shards),
            tokenizer=tokenizer,
            seq_length=seq_length,
        ),
        model_vocab_size=ends[-1],
    )
    dataset = build_dataset(
        mixture, num_sequences=sequences, seq_length=seq_length, seed=seed, cache=folder / "index", reads_data=True
    )
    for number in range(len(dataset)):
        sample = dataset[number]
        assert sample["loss_mask"].dtype == torch.float32
        assert sample["loss_mask"].tolist() == marks[sample["labels"].numpy()].tolist()


# ---- training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """Where two ranks have trained everything in `masks.py`."""
    path = tmp_path_factory.mktemp("masks")
    zygote.run("tests.cpu.masks:main", path, log=path / "log", ranks=2, timeout_s=LAUNCH_TIMEOUT_S)
    return path


@pytest.fixture(scope="module")
def checks(folder: Path) -> dict[str, Any]:
    """What one rank computed in plain torch."""
    return rundir.read_json(folder / "checks.json")


@pytest.fixture
def metrics(folder: Path):
    """The metrics of a run, by its name."""

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]

    return read


def test_a_cut_sequence_has_the_logits_of_its_documents_run_alone(checks):
    assert max(checks["documents"]) > 2
    assert checks["packed_from_apart"] < LOGIT_TOLERANCE
    assert checks["across_from_apart"] > 0.1


def test_positions_begin_anew_in_the_rotary_embedding(checks):
    assert checks["queries_from_apart"] < LOGIT_TOLERANCE


@pytest.mark.parametrize("run", ["cut", "across"])
def test_the_first_loss_and_gradient_are_those_of_plain_torch(run, checks, metrics):
    loss, gradient_norm = checks[run]
    assert metrics(run)[0]["train/loss"] == pytest.approx(loss, abs=FP32_TOLERANCE)
    assert metrics(run)[0]["optim/grad_norm"] == pytest.approx(gradient_norm, rel=1e-5)


def test_cutting_changes_the_loss(checks):
    assert abs(checks["cut"][0] - checks["across"][0]) > 0.01
    assert len(set(checks["counts"])) > 1  # sequences that do not count alike


@pytest.mark.parametrize("layout", [*CUT_LAYOUTS, "rows"])
def test_a_cut_run_agrees_with_one_rank(layout, metrics):
    reference, rows = metrics("cut"), metrics(f"cut-{layout}")
    assert len(rows) == len(reference) == STEPS
    _agree(rows, reference)


@pytest.mark.slow
def test_stages_in_the_middle_of_a_pipeline_cut_too(folder, metrics, zygote):
    zygote.run("tests.cpu.masks:main", folder, log=folder / "log", ranks=4, timeout_s=LAUNCH_TIMEOUT_S)
    _agree(metrics("cut-pp4"), metrics("cut"))


def test_a_cut_run_in_bf16_agrees_with_fp32(metrics):
    losses, reference = ([row["train/loss"] for row in metrics(name)] for name in ("cut-bf16", "cut"))
    assert losses == pytest.approx(reference, abs=0.05)


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
def test_ranks_with_uneven_counts_or_none_agree_with_one_rank(layout, metrics):
    _agree(metrics(f"sparse-{layout}"), metrics("sparse"))


def test_a_step_in_which_nothing_counts_has_no_loss_and_no_gradient(checks, metrics):
    counts = np.array(checks["sparse_counts"]).reshape(SPARSE_STEPS, SPARSE_BATCH)
    some, none = (counts == 0).sum(1) == 1, (counts == 0).all(1)
    assert some.any()  # a rank without anything to learn from beside one that has
    assert none.any()
    for row, empty in zip(metrics("sparse"), none, strict=True):
        assert (row["train/loss"] == 0.0) == (row["optim/grad_norm"] == 0.0) == empty


def _agree(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(rows, reference, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=FP32_TOLERANCE)
        assert ours["optim/grad_norm"] == pytest.approx(theirs["optim/grad_norm"], rel=1e-5)
