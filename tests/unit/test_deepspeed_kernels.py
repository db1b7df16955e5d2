"""A killed compile must not make every later one wait for its lock."""

from __future__ import annotations

from megatron_octo.platform.deepspeed_kernels import TORCH_LOCK, remove_stale_lock


def test_the_lock_of_a_killed_compile_is_removed_and_that_of_a_living_one_is_kept(tmp_path):
    with (tmp_path / TORCH_LOCK).open("w"):
        remove_stale_lock(tmp_path)
        assert (tmp_path / TORCH_LOCK).exists()
    remove_stale_lock(tmp_path)
    assert not (tmp_path / TORCH_LOCK).exists()
    remove_stale_lock(tmp_path)
