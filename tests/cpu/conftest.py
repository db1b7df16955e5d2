"""The process that forks ranks, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cpu.zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts `octo` on ranks that need not import megatron-core."""
    process = Zygote()
    yield process
    process.close()
