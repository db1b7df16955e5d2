"""The descent of a model, kept whole in each folder."""

from megatron_octo import lineage
from megatron_octo.lineage import Lineage


def test_a_lineage_survives_the_disk_with_all_its_ancestors(tmp_path):
    base = Lineage(name="base", kind="base", weights_sha256="a")
    stable = Lineage(name="stable", kind="train", weights_sha256="b", step=10, tokens=100, parent=base)
    branch = Lineage(name="decay", kind="train", weights_sha256="c", step=5, tokens=50, parent=stable)
    lineage.write(tmp_path, branch)
    assert lineage.read(tmp_path) == branch
    assert [link.name for link in lineage.read(tmp_path).chain()] == ["base", "stable", "decay"]
    assert lineage.read_if_present(tmp_path / "nothing") is None
