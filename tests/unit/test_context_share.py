"""What a context-parallel rank takes of a batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make setup")

CONTEXT_RANKS = 2
LENGTH = 16


def test_each_rank_takes_the_same_two_parts_of_every_tensor_of_its_own_group(monkeypatch):
    import torch.distributed as dist
    from megatron.core import parallel_state as groups

    from megatron_octo.train.step import _context_share

    keys = ("tokens", "labels", "loss_mask", "position_ids")
    monkeypatch.setattr(groups, "get_context_parallel_group", lambda: "context")
    monkeypatch.setattr(dist, "get_world_size", {"context": CONTEXT_RANKS}.__getitem__)  # no other group is asked
    shares = []
    for rank in range(CONTEXT_RANKS):
        monkeypatch.setattr(dist, "get_rank", {"context": rank}.__getitem__)
        batch = {key: torch.arange(LENGTH)[None] for key in keys}
        share = _context_share(batch, SimpleNamespace(context_parallel_size=CONTEXT_RANKS))
        shares.append([share[key][0].tolist() for key in keys])
    part = LENGTH // (2 * CONTEXT_RANKS)
    first, last = [*range(part), *range(LENGTH - part, LENGTH)], [*range(part, LENGTH - part)]
    assert shares == [[first] * len(keys), [last] * len(keys)]


def test_without_context_parallelism_a_rank_takes_the_batch_as_it_is():
    from megatron_octo.train.step import _context_share

    batch = {"tokens": torch.arange(LENGTH)[None]}
    assert _context_share(batch, SimpleNamespace(context_parallel_size=1)) is batch
