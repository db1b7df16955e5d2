"""The ledger counts each source's tokens from the blend's own order, phase after phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_octo import rundir
from megatron_octo.budget.ledger import Block, Ledger, Phase, SourceTokens, Stream, next_phases, read_ledger
from megatron_octo.config.base import to_dict
from megatron_octo.config.data import SourceConfig

NAMES = ("web", "short", "chat")
SOURCES = tuple(
    SourceConfig(name=name, path=Path(name), weight=w) for name, w in zip(NAMES, (0.5, 0.3, 0.2), strict=True)
)
# web has two shards, 0 and 1; short and chat one each
ORDER = np.array([0, 2, 1, 0, 2, 3, 0, 1, 3, 3], dtype=np.int16)
SHARDS = [Path("/web/0"), Path("/web/1"), Path("/short/0"), Path("/chat/0")]


def ledger(used: int = 0, shards: list[Path] = SHARDS) -> Ledger:
    """The ledger of a phase of 8 sequences, of each shard `used` before."""
    block = Block(num_samples=9, seed=1)
    return Ledger(
        phases=(Phase(sources=SOURCES),),
        available=(100, 10, 5),
        streams=[Stream(prefix=prefix, blocks=(block,), used=used) for prefix in shards],
        source_of=[0, 0, 1, 2],
        order=ORDER,
        num_sequences=8,
        seq_length=10,
    )


def lines(sources: tuple[SourceTokens, ...]) -> list[tuple[str, int, int]]:
    """(name, planned, consumed) of each."""
    return [(each.name, each.planned, each.consumed) for each in sources]


def test_planned_and_consumed_tokens_of_each_source():
    assert lines(ledger().sources(4)) == [("web", 50, 30), ("short", 20, 10), ("chat", 10, 0)]


def test_sequences_of_the_blend_beyond_the_budget_are_not_planned():
    assert sum(each.planned for each in ledger().sources(0)) == 80


def test_at_the_end_all_that_was_planned_is_consumed():
    assert all(each.planned == each.consumed for each in ledger().sources(8))


def test_a_run_that_goes_back_counts_anew():
    counts = ledger()
    late, early = lines(counts.sources(7)), lines(counts.sources(2))
    assert early == lines(ledger().sources(2))
    assert lines(counts.sources(7)) == late != early


def test_epochs_are_tokens_over_available_ones():
    assert [(each.planned_epochs, each.epochs) for each in ledger().sources(4)] == [(0.5, 0.3), (2.0, 1.0), (2.0, 0.0)]


def test_metrics_have_three_numbers_a_source():
    numbers = ledger().numbers(4)
    assert len(numbers) == 9
    assert (numbers["data/web/planned_tokens"], numbers["data/web/consumed_tokens"]) == (50, 30)
    assert numbers["data/short/epochs"] == 1.0


def test_the_record_survives_the_disk_and_says_how_far_each_shard_was_read(tmp_path):
    record = ledger(used=3).record(4)
    rundir.write_json(tmp_path / "ledger.json", to_dict(record))
    assert read_ledger(tmp_path) == record
    assert (record.planned_tokens, record.consumed_tokens) == (80, 40)
    assert [(each.prefix, each.used) for each in record.streams] == list(zip(SHARDS, [5, 4, 4, 3], strict=True))


def test_the_same_sources_go_on_in_the_same_phase():
    assert next_phases(SOURCES, ledger().record(4), seq_length=10) == (Phase(sources=SOURCES),)


def test_other_weights_begin_a_phase_that_keeps_what_was_consumed():
    record = ledger().record(4)
    other = (replace(SOURCES[0], weight=0.7), replace(SOURCES[1], name="long", weight=0.3))
    phases = next_phases(other, record, seq_length=10)
    assert phases[:-1] == record.phases
    assert (phases[-1].start_sequences, phases[-1].before, phases[-1].streams) == (4, record.sources, record.streams)

    later = Ledger(
        phases=phases,
        available=(100, 40),
        streams=record.streams[:2],
        source_of=[0, 1],
        order=np.array([0, 1, 0, 0]),
        num_sequences=4,
        seq_length=10,
    )
    assert lines(later.sources(4)) == [("web", 60, 30), ("long", 10, 0), ("short", 10, 10), ("chat", 0, 0)]
    end = later.record(8)
    assert end.planned_tokens == end.consumed_tokens == 80
    assert all(each.planned == each.consumed for each in end.sources)
    assert len(end.streams) == len(SHARDS)  # those of sources left out are remembered
    assert next_phases(other, end, seq_length=10) == phases


def test_a_shard_that_is_mixed_twice_was_read_as_far_as_the_farther_reader():
    streams = ledger(shards=[SHARDS[0], SHARDS[0], *SHARDS[2:]]).record(8).streams
    assert {each.prefix: each.used for each in streams}[SHARDS[0]] == 3


def test_a_phase_says_what_it_reads():
    assert Phase(sources=SOURCES).describe() == "reads web 50.0%, short 30.0%, chat 20.0%"
    assert Phase(sources=SOURCES[:1], start_sequences=1000).describe().endswith("after 1,000 sequences")
