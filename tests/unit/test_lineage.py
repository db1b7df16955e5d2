"""The descent of a model, kept whole in each folder."""

import re

from megatron_octo import lineage
from megatron_octo.lineage import Lineage
from megatron_octo.rundir import write_json


def test_a_lineage_survives_the_disk_with_all_its_ancestors(tmp_path):
    base = Lineage(name="base", kind="base", weights_sha256="a")
    stable = Lineage(name="stable", kind="train", weights_sha256="b", step=10, tokens=100, parent=base)
    branch = Lineage(name="decay", kind="train", weights_sha256="c", step=5, tokens=50, parent=stable)
    lineage.write(tmp_path, branch)
    assert lineage.read(tmp_path) == branch
    assert [link.name for link in lineage.read(tmp_path).chain()] == ["base", "stable", "decay"]
    assert lineage.read_if_present(tmp_path / "nothing") is None


def test_a_training_runs_link_has_its_recipe_its_data_and_its_code(tmp_path):
    link = Lineage(
        name="x",
        kind="train",
        weights_sha256="a",
        recipe_sha256="b",
        data=(("web", "c"), ("chat", "d")),
        code=lineage.code_version(),
    )
    lineage.write(tmp_path, link)
    assert lineage.read(tmp_path) == link
    assert re.fullmatch(r"0\.1\.0\+[0-9a-f]{12}", link.code)


def test_the_code_version_follows_every_source_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lineage, "__file__", str(tmp_path / "lineage.py"))
    version = lineage.code_version.__wrapped__  # the function remembers its answer
    versions = [version()]
    for name, content in (("lineage.py", "1"), ("lineage.py", "2"), ("train/run.py", "1"), ("train/run.py", "3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        versions.append(version())
    (tmp_path / "train" / "run.py").rename(tmp_path / "train" / "step.py")
    versions.append(version())
    assert len(set(versions)) == len(versions)
    (tmp_path / "notes.txt").write_text("no code")
    assert version() == versions[-1]


def test_a_link_that_an_earlier_version_wrote_is_read(tmp_path):
    old = {"name": "x", "kind": "train", "weights_sha256": "a", "step": 1, "tokens": 2, "parent": None}
    write_json(tmp_path / "lineage.json", old)
    assert lineage.read(tmp_path) == Lineage(name="x", kind="train", weights_sha256="a", step=1, tokens=2)
