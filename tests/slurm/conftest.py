"""One Slurm for the tests of this folder, and the repository as a user submits from it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.slurm.cluster import GPUS, Cluster, cluster, missing
from tests.slurm.jobs import set_in_site, shim

NVIDIA_SMI = f"""\
# Stands for the driver's: one row a GPU; on a node with a file of its name here, the first one has errors.
for ((i = 0; i < {GPUS}; i++)); do
    echo "$i, 4, $([[ $i == 0 && -e $(dirname "$0")/$SLURMD_NODENAME ]] && echo 3 || echo 0)"
done
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Eight virtual nodes of eight fake GPUs."""
    yield from _slurm(nodes=8, accounting=False)


@pytest.fixture
def wide_slurm() -> Iterator[Cluster]:
    """Sixty-four such nodes, 512 GPUs."""
    yield from _slurm(nodes=64, accounting=False)


@pytest.fixture(scope="session")
def accounted_slurm() -> Iterator[Cluster]:
    """Two such nodes of a Slurm that keeps account of its jobs."""
    yield from _slurm(nodes=2, accounting=True)


def _slurm(*, nodes: int, accounting: bool) -> Iterator[Cluster]:
    if why := missing(accounting=accounting):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="octo-slurm-", dir="/tmp") as folder:  # sockets want short names
        Path(folder).chmod(0o711)  # the database is not root's
        with cluster(Path(folder) / "s", nodes=nodes, accounting=accounting) as running:
            yield running


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a site file for `slurm`; runs go to its runs/, and bin/ is first on PATH."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
    for name in ("megatron_octo", "recipes"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "bin").mkdir()
    shim(folder, "nvidia-smi", NVIDIA_SMI)
    (folder / "slurm" / "site.sh").write_text(
        f"OCTO_PYTHON={sys.executable}\n"
        f"export OCTO_RUNS=${{OCTO_RUNS:-{folder}/runs}} PATH={folder}/bin:$PATH\n"
        "export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1\n"
    )
    return folder


@pytest.fixture
def stubbed(checkout: Path) -> Path:
    """The checkout with tasks that only say where they are."""
    shim(checkout, "stub", f'exec {sys.executable} -S {REPOSITORY}/tests/slurm/stub.py "$@"')
    set_in_site(checkout, f"OCTO_PYTHON={checkout}/bin/stub\nexport PYTHONPATH={REPOSITORY}")
    return checkout
