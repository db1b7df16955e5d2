"""A phase, or a branch, reads a shard on from the first sequence that was not read, exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo.budget.ledger import LedgerRecord, Phase, next_phases
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.data import loader
from megatron_octo.data.mixture import read_mixture
from megatron_octo.data.phase import PhaseDataset, open_ledger, open_phase
from tests.prepared import BATCH, SEQ_LENGTH, VOCAB, stage, write_data

Read = list[tuple[tuple[int, int, int], list[int]]]


@pytest.fixture
def config(tmp_path: Path) -> MidTrainConfig:
    """20 steps of 8 sequences, of less than an epoch of each shard."""
    write_data(tmp_path / "data")
    return stage(tmp_path / "data", "run")


def opened(config: MidTrainConfig, cache: Path, *phases: Phase) -> PhaseDataset:
    """The last phase's sequences."""
    mixture = read_mixture(config.data, model_vocab_size=VOCAB)
    dataset = open_phase(config, mixture, phases[-1], cache=cache)
    assert dataset is not None
    return dataset


def record(config: MidTrainConfig, dataset: PhaseDataset, *phases: Phase, consumed: int) -> LedgerRecord:
    """The ledger after `consumed` sequences."""
    mixture = read_mixture(config.data, model_vocab_size=VOCAB)
    return open_ledger(config, mixture, phases, dataset).record(consumed)


def read(dataset: PhaseDataset, start: int, stop: int) -> Read:
    """(identity, tokens) of sequences."""
    return [(dataset.identity(number), dataset[number]["tokens"].tolist()) for number in range(start, stop)]


def of_shard(shard: int, sequences: Read) -> Read:
    """Those of one shard, in their order."""
    return [each for each in sequences if each[0][0] == shard]


def reweighed(config: MidTrainConfig, a: float) -> MidTrainConfig:
    """The same with weight `a` for source a."""
    first, second = config.data.sources
    sources = (replace(first, weight=a), replace(second, weight=1 - a))
    return replace(config, data=replace(config.data, sources=sources))


def test_the_phase_after_a_change_of_weights_reads_each_shard_on(config, tmp_path):
    first = (Phase(sources=config.data.sources),)
    whole = opened(config, tmp_path / "one", *first)
    other = reweighed(config, 0.3)
    phases = next_phases(other.data.sources, record(config, whole, *first, consumed=6 * BATCH), seq_length=SEQ_LENGTH)
    later = opened(other, tmp_path / "two", *phases)
    before, unread, after = (
        read(whole, 0, 6 * BATCH),
        read(whole, 6 * BATCH, 20 * BATCH),
        read(later, 6 * BATCH, 20 * BATCH),
    )
    for shard in range(4):
        expected, got = of_shard(shard, unread), of_shard(shard, after)
        shared = min(len(expected), len(got))
        assert shared > 8
        assert got[:shared] == expected[:shared]
    assert not {identity for identity, _ in before} & {identity for identity, _ in after}
    assert sum(identity[0] < 2 for identity, _ in after) == pytest.approx(0.3 * len(after), abs=2)


def test_the_ledger_of_a_run_reweighed_twice_ends_with_all_that_was_planned(config, tmp_path):
    phases: tuple[Phase, ...] = (Phase(sources=config.data.sources),)
    made = record(config, opened(config, tmp_path / "one", *phases), *phases, consumed=5 * BATCH)
    for weight, stop in ((0.2, 12), (0.5, 20)):
        now = reweighed(config, weight)
        phases = next_phases(now.data.sources, made, seq_length=SEQ_LENGTH)
        made = record(now, opened(now, tmp_path / str(stop), *phases), *phases, consumed=stop * BATCH)
        assert made.planned_tokens == config.budget.train_tokens
        assert made.consumed_tokens == stop * BATCH * SEQ_LENGTH
    assert all(each.planned == each.consumed for each in made.sources)
    assert [phase.start_sequences for phase in made.phases] == [0, 5 * BATCH, 12 * BATCH]
    shares = [each.consumed / made.consumed_tokens for each in made.sources]
    assert shares[0] == pytest.approx((0.7 * 5 + 0.2 * 7 + 0.5 * 8) / 20, abs=0.02)


def test_a_shard_read_to_the_end_of_its_epochs_begins_another_in_another_order(config, tmp_path):
    first = (Phase(sources=config.data.sources),)
    whole = opened(config, tmp_path / "one", *first)
    streams = record(config, whole, *first, consumed=19 * BATCH).streams
    longer = replace(config, budget=replace(config.budget, train_tokens=100 * BATCH * SEQ_LENGTH))
    phase = Phase(sources=config.data.sources, streams=streams)
    child = opened(longer, tmp_path / "two", phase)
    seed = config.data.shuffle_seed
    assert [block.seed for block in child.blend.datasets[0].stream.blocks] == [seed, seed + 1]
    sequences = of_shard(0, read(child, 0, 100 * BATCH))
    blocks = [block for (_, block, _), _ in sequences]
    assert sorted(set(blocks)) == [0, 1]
    assert blocks == sorted(blocks)
    length = len(whole.blend.datasets[0])  # an epoch
    assert len({identity for identity, _ in sequences if identity[1] == 0}) == length - streams[0].used


def test_with_nothing_read_before_the_sequences_are_megatrons(config, tmp_path, monkeypatch):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    longer = replace(config, budget=replace(config.budget, train_tokens=100 * BATCH * SEQ_LENGTH))  # several epochs
    ours = opened(longer, tmp_path / "one", Phase(sources=config.data.sources))
    monkeypatch.setattr(loader, "stream_dataset_class", lambda *_: GPTDataset)
    megatrons = opened(longer, tmp_path / "two", Phase(sources=config.data.sources))
    for number in range(100 * BATCH):
        assert ours[number]["tokens"].equal(megatrons[number]["tokens"])


def test_a_branch_with_another_seed_still_reads_the_parents_order_on(config, tmp_path):
    first = (Phase(sources=config.data.sources),)
    whole = opened(config, tmp_path / "one", *first)
    streams = record(config, whole, *first, consumed=10 * BATCH).streams
    branch = replace(config, data=replace(config.data, shuffle_seed=99))
    child = opened(branch, tmp_path / "two", Phase(sources=config.data.sources, streams=streams))
    for shard in range(4):
        expected = of_shard(shard, read(whole, 10 * BATCH, 20 * BATCH))
        assert of_shard(shard, read(child, 0, 20 * BATCH))[: len(expected)] == expected
