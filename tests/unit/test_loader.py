"""The data position is one number, so any number of ranks reads the same global batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_octo.data.loader import sequence_numbers


def _global_batch(consumed: int, *, data_ranks: int, rows: int, batch: int) -> list[int]:
    """Numbers in the order in which one rank would read them."""
    return [
        number
        for micro_batch in range(batch // (data_ranks * rows))
        for rank in range(data_ranks)
        for number in sequence_numbers(
            consumed, micro_batch, data_rank=rank, data_ranks=data_ranks, micro_batch_sequences=rows
        )
    ]


@given(consumed=st.integers(0, 10**9), ranks=st.sampled_from([1, 2, 4, 8]), rows=st.sampled_from([1, 2, 4]))
def test_any_number_of_ranks_reads_the_next_batch_once_and_in_order(consumed, ranks, rows):
    assert _global_batch(consumed, data_ranks=ranks, rows=rows, batch=32) == list(range(consumed, consumed + 32))


def test_ranks_take_turns_by_micro_batch():
    second = sequence_numbers(100, 1, data_rank=1, data_ranks=2, micro_batch_sequences=3)
    assert list(second) == [109, 110, 111]
