"""Conversion without megatron: what returns unchanged, and what is found where something does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_octo import rundir
from megatron_octo.convert import hf_folder, output, torch_dist
from megatron_octo.convert import verify as verify_module
from megatron_octo.convert.from_hf import from_hf
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.errors import BadInput, VerificationError
from tests.conftest import flip_bit, snapshot
from tests.unit.small_model import load_folder


def test_weights_return_byte_for_byte(made: Path, words: Path, tmp_path: Path) -> None:
    to_hf(made / "import", tmp_path / "out", words, dtype="fp32", verify=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (made / "base/model.safetensors").read_bytes()


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_bit_that_the_disk_turns_is_found(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """One in the numbers of the last tensor, in the last of several files."""
    for function in (torch_dist.write, hf_folder.write_weights):
        monkeypatch.setitem(function.__kwdefaults__, "max_file_bytes", 4096)
    write_files = output.write_files

    def spoil(write: Callable[[Path], None]) -> Callable[[Path], None]:
        def spoilt(path: Path) -> None:
            write(path)
            number = load_folder(made / "base")["lm_head.weight"].numpy().tobytes()[-64:]
            content = path.read_bytes()
            if number in content:
                path.write_bytes(content.replace(number, number[:-1] + bytes([number[-1] ^ 1])))

        return spoilt

    for module in (torch_dist, hf_folder):
        monkeypatch.setattr(
            module, "write_files", lambda folder, names, write, check: write_files(folder, names, spoil(write), check)
        )

    def convert(verify: bool) -> None:
        if way == "in":
            from_hf(made / "base", tmp_path / "import", verify=verify, logits=False)
        else:
            to_hf(made / "import", tmp_path / "out", words, dtype="fp32", verify=verify, logits=False)

    with pytest.raises(VerificationError, match=r"1 tensors differ from those of .*: lm_head.weight"):
        convert(verify=True)
    assert not list(tmp_path.iterdir())
    convert(verify=False)


@pytest.mark.parametrize("damage", ["a bit", "no file"])
def test_an_output_that_was_damaged_since_is_refused(made: Path, words: Path, tmp_path: Path, damage: str) -> None:
    calls = (
        lambda **options: from_hf(made / "base", tmp_path / "import", verify=False, **options),
        lambda **options: to_hf(made / "import", tmp_path / "out", words, verify=False, **options),
    )
    for call in calls:
        out = call()
        (weights,) = (*out.glob("*.safetensors"), *out.glob("*.distcp"))
        if damage == "a bit":
            flip_bit(weights)
        else:
            weights.unlink()
        with pytest.raises(BadInput, match="is damaged"):
            call()
        call(overwrite=True)
        call()


def test_an_import_that_was_damaged_since_is_not_exported(made: Path, words: Path, tmp_path: Path) -> None:
    save = Path(shutil.copytree(made / "import", tmp_path / "import"))
    (file,), number = save.glob("*.distcp"), load_folder(made / "base")["lm_head.weight"].numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(number, number[:-1] + bytes([number[-1] ^ 1])))
    with pytest.raises(BadInput, match=r"import .* was damaged since it was made"):
        to_hf(save, tmp_path / "out", words, logits=False)
    assert [path.name for path in tmp_path.iterdir()] == ["import"]


def test_a_comparison_that_a_finished_output_lacks_is_made(made: Path, words: Path, tmp_path: Path) -> None:
    first = from_hf(made / "base", tmp_path / "import", verify=False)
    second = to_hf(first, tmp_path / "out", words, verify=False)
    before = snapshot(made / "base")
    from_hf(made / "base", first, logits=False)
    to_hf(first, second, words, logits=False)
    for folder in (first, second):
        assert rundir.read_json(folder / "verify.json")["num_tensors"] == 2 * 9 + 3
        assert verify_module.is_verified(folder, logits=False) and not verify_module.is_verified(folder, logits=True)
    assert "`verify.json` holds the comparison" in (second / "README.md").read_text()
    assert snapshot(made / "base") == before


def test_a_logit_that_is_no_number_fails_whichever_comes_after_it(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.rand(16, 64, 32)
    wrong = logits.clone()
    wrong[3, 5, 7] = float("nan")
    monkeypatch.setattr(verify_module, "_hf_logits", lambda *arguments: logits)
    monkeypatch.setattr(verify_module, "_megatron_logits", lambda *arguments, streamed: wrong)
    with pytest.raises(VerificationError, match="logits differ by up to nan"):
        to_hf(made / "import", tmp_path / "out", words)
