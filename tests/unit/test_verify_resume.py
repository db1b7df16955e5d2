"""The next 1,000 global batches are the same for any number of ranks, and the proof of it catches what is planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.data import loader
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.train.state import read_state
from megatron_octo.train.verify_resume import Proof, verify_resume
from tests.conftest import snapshot
from tests.prepared import BATCH, stage, write_cut_off_run, write_data

STEPS, SAVED = 1010, 10


@pytest.fixture
def config(runs: Path, tmp_path: Path) -> MidTrainConfig:
    """A run that was cut off at some step after its save of step 10, as its folder says it."""
    write_data(tmp_path / "data")
    config = stage(tmp_path / "data", "run", steps=STEPS)
    config = replace(config, budget=replace(config.budget, micro_batch_sequences=1))
    write_cut_off_run(config, SAVED)
    return config


def differences(proof: Proof) -> dict[int, int | None]:
    """The first batch that differs, by the number of data ranks."""
    return {each.data_ranks: each.differs_at for each in proof.layouts}


def test_1000_batches_are_the_same_for_1_2_4_and_8_ranks_and_nothing_is_written(config, runs):
    before = snapshot(runs)
    proof = verify_resume(config, num_batches=5000)  # there are 1000 left
    assert differences(proof) == {1: None, 2: None, 4: None, 8: None}
    assert proof.holds
    assert (proof.first_batch, proof.last_batch) == (SAVED + 1, STEPS) == (11, 1010)
    assert snapshot(runs) == before


def test_micro_batches_and_borders_of_documents_change_nothing(config):
    whole = verify_resume(config, num_batches=20)
    other = replace(config, budget=replace(config.budget, micro_batch_sequences=4))
    proof = verify_resume(other, num_batches=20)
    assert [(each.data_ranks, each.micro_batch_sequences) for each in proof.layouts] == [(1, 4), (2, 4), (1, 1)]
    assert proof.holds
    assert proof.sha256 == whole.sha256


def test_a_shifted_position_is_caught(config):
    save = rundir.step_folder(rundir.run_folder("run"), SAVED)
    state = read_state(save)
    replace(state, consumed_sequences=state.consumed_sequences + 1).write(save)
    proof = verify_resume(config, num_batches=5)
    assert not proof.holds
    assert differences(proof) == dict.fromkeys((1, 2, 4, 8), SAVED + 1)


def test_an_index_of_another_seed_is_caught(config):
    shuffled = next((rundir.run_folder("run") / "index").glob("*-shuffle_index.npy"))
    order = np.load(shuffled)
    np.save(shuffled, np.random.default_rng(1).permutation(order).astype(order.dtype))
    assert not verify_resume(config, num_batches=20).holds


def test_a_loader_that_shares_out_wrongly_is_caught_where_it_does(config, monkeypatch):
    right = loader.sequence_numbers

    def wrong(consumed: int, micro_batch: int, *, data_rank: int, data_ranks: int, micro_batch_sequences: int) -> range:
        rank = data_ranks - 1 - data_rank if consumed > 14 * BATCH else data_rank
        return right(
            consumed, micro_batch, data_rank=rank, data_ranks=data_ranks, micro_batch_sequences=micro_batch_sequences
        )

    monkeypatch.setattr(loader, "sequence_numbers", wrong)
    assert differences(verify_resume(config, num_batches=20)) == {1: None, 2: 16, 4: 16, 8: 16}


def test_a_changed_byte_of_a_shard_is_caught(config):
    path = config.data.sources[1].path / "00001.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"00001\.bin was changed"):
        verify_resume(config, num_batches=5)


def test_another_seed_in_the_settings_is_caught_even_if_the_run_folder_has_it_too(config):
    other = replace(config, data=replace(config.data, shuffle_seed=99))
    with pytest.raises(BadInput, match=r"data\.shuffle_seed: 1234 in the folder, 99 asked for"):
        verify_resume(other, num_batches=5)
    rundir.write_json(rundir.run_folder("run") / "config.json", to_dict(other))
    with pytest.raises(BadInput, match=r"step_00000010 was made with other settings"):
        verify_resume(other, num_batches=5)


def test_a_run_without_a_save_has_nothing_to_prove(config):
    (rundir.step_folder(rundir.run_folder("run"), SAVED) / "DONE").unlink()
    with pytest.raises(BadInput, match="no save that batches follow"):
        verify_resume(config, num_batches=5)
