"""The data position is one number, so any number of ranks reads the same global batches."""

from __future__ import annotations

import shutil

from hypothesis import given
from hypothesis import strategies as st

from megatron_octo.data.loader import build_dataset, sequence_numbers
from megatron_octo.data.mixture import read_mixture
from tests.prepared import SEQ_LENGTH, VOCAB, stage, write_data, write_documents


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


def test_an_index_of_data_that_were_prepared_anew_is_not_used(tmp_path):
    data, config = tmp_path / "data", stage(tmp_path / "data", "x").data
    write_data(data)
    documents = [[3 + number % 60] * (5 + number) for number in range(40)]

    def prepare_a(documents: list[list[int]]) -> None:
        shutil.rmtree(data / "a")
        write_documents(data / "a", data / "tokenizer", [documents], VOCAB)

    def sequences(cache) -> list[list[int]]:
        mixture = read_mixture(config, model_vocab_size=VOCAB)
        made = build_dataset(mixture, num_sequences=90, seq_length=SEQ_LENGTH, seed=1, cache=cache, reads_data=True)
        return [made[number]["tokens"].tolist() for number in range(90)]

    prepare_a(documents)
    old, files = sequences(tmp_path / "kept"), sorted((tmp_path / "kept").iterdir())
    assert sequences(tmp_path / "kept") == old
    assert sorted((tmp_path / "kept").iterdir()) == files
    prepare_a(documents[::-1])  # as many tokens, so nothing else of the cache's key changes
    assert sequences(tmp_path / "kept") == sequences(tmp_path / "new") != old
