"""The ledger counts each source's tokens from the blend's own order."""

from __future__ import annotations

import numpy as np

from megatron_octo.budget import ledger

ORDER = np.array([0, 1, 0, 0, 1, 2, 0, 0, 2, 2], dtype=np.int16)


def _count(consumed: int, planned: int = 8):
    return ledger.count(
        ORDER,
        names=("web", "short", "chat", "unused"),
        available=(100, 10, 5, 7),
        planned_sequences=planned,
        consumed_sequences=consumed,
        seq_length=10,
    )


def test_planned_and_consumed_tokens_of_each_source():
    assert [(each.name, each.planned, each.consumed) for each in _count(4)] == [
        ("web", 50, 30),
        ("short", 20, 10),
        ("chat", 10, 0),
        ("unused", 0, 0),
    ]


def test_sequences_of_the_blend_beyond_the_budget_are_not_planned():
    assert sum(each.planned for each in _count(0)) == 80


def test_at_the_end_all_that_was_planned_is_consumed():
    assert all(each.planned == each.consumed for each in _count(8))


def test_epochs_are_planned_tokens_over_available_ones():
    assert [each.planned_epochs for each in _count(0)] == [0.5, 2.0, 2.0, 0.0]


def test_the_file_holds_totals_and_a_line_a_source():
    value = ledger.to_json(_count(4))
    assert (value["planned_tokens"], value["consumed_tokens"]) == (80, 40)
    assert value["sources"][1] == {
        "name": "short",
        "available": 10,
        "planned": 20,
        "consumed": 10,
        "planned_epochs": 2.0,
    }
