"""A conversion that is killed, at any operation on the disk: nothing under the final name, and the next one ends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert.output import PLAN
from tests.conftest import snapshot, word_tokenizer
from tests.cpu import faults
from tests.cpu.zygote import Zygote

MODEL = ModelConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24, vocab_size=32, tied_embeddings=False
)
KILLED = -9
FILE_BYTES = 2048
POINTS = 12
WEIGHTS = {"to-hf": "*.safetensors", "from-hf": "*.distcp"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, `base`, a random model, and `import`, made from it."""
    from megatron_octo.convert.from_hf import from_hf
    from megatron_octo.convert.random_base import random_base

    folder = tmp_path_factory.mktemp("killed")
    random_base(RandomBaseConfig(model=MODEL, tokenizer=word_tokenizer(folder / "words"), output=folder / "base"))
    from_hf(folder / "base", folder / "import", logits=False)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["to-hf", "from-hf"])
def test_wherever_a_conversion_is_killed_the_next_one_ends_it(
    way: str, work: Path, tmp_path: Path, zygote: Zygote
) -> None:
    log, record = tmp_path / "log", tmp_path / "operations"

    def attempt(folder: Path, at: int) -> int:
        folder.mkdir()
        (code,) = zygote.call(f"{__name__}:convert_with", at, str(record), way, work, folder / "out", log=log).wait()
        return int(code)

    assert attempt(tmp_path / "whole", 0) == 0, log.read_text()[-3000:]
    whole, operations = content(tmp_path / "whole"), record.read_text().splitlines()
    assert sum(line.startswith("write") for line in operations) > 5
    most_kept = 0
    for at in (*range(1, len(operations), len(operations) // POINTS), len(operations)):
        folder = tmp_path / f"killed-{at}"
        assert attempt(folder, at) == KILLED, operations[at - 1]
        assert not (folder / "out").exists(), operations[at - 1]
        partial = folder / ".out.partial"
        kept = {path.name: path.stat() for path in partial.glob(WEIGHTS[way]) if (partial / PLAN).exists()}
        convert(way, work, folder / "out")
        assert content(folder) == whole, operations[at - 1]
        for name, before in kept.items():
            after = (folder / "out" / name).stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        most_kept = max(most_kept, len(kept))
    assert most_kept > 5


def content(folder: Path) -> dict[str, str]:
    """All files, but for torch's index, which has a random id."""
    return {path: digest for path, digest in snapshot(folder).items() if not path.endswith(".metadata")}


def convert_with(at: int, record: str, way: str, work: str, output: str) -> None:
    """Convert; the process is killed in the operation `at` on files of the output, if that is not 0."""
    faults.install("kill", at, record, where=f"/.{Path(output).name}.")
    convert(way, Path(work), Path(output))


def convert(way: str, work: Path, output: Path) -> None:
    """Convert, with small weight files."""
    from megatron_octo.convert import hf_folder, torch_dist
    from megatron_octo.convert.from_hf import from_hf
    from megatron_octo.convert.to_hf import to_hf

    with pytest.MonkeyPatch.context() as patch:
        for function in (hf_folder.write_weights, torch_dist.write):
            patch.setitem(function.__kwdefaults__, "max_file_bytes", FILE_BYTES)
        if way == "from-hf":
            from_hf(work / "base", output, logits=False)
        else:
            to_hf(work / "import", output, work / "words", dtype="fp32", verify=False)
