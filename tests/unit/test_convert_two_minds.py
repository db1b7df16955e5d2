"""Conversions asked for twice, not quite the same, and folders that say two things."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_octo import rundir
from megatron_octo.cli.app import main
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert import output, torch_dist, verify
from megatron_octo.convert import to_hf as to_hf_module
from megatron_octo.convert.from_hf import from_hf
from megatron_octo.convert.random_base import random_base
from megatron_octo.convert.save import Save
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.errors import BadInput
from tests.unit.small_model import MODEL

NORM = "decoder.final_layernorm.weight"


class Killed(BaseException):
    """As a SIGKILL: nothing is tidied up."""


def test_an_import_whose_base_has_other_settings_by_now_is_refused(base: Path, tmp_path: Path) -> None:
    out = from_hf(base, tmp_path / "import", logits=False)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rope_theta": 10_000.0}))
    with pytest.raises(
        BadInput, match=r"import was made with other settings:\n  rope_theta: 500000\.0 in the folder, 10000\.0 asked"
    ):
        from_hf(base, out, logits=False)
    assert from_hf(base, out, logits=False, overwrite=True)
    assert Save(out).model.rope_theta == 10_000.0


def test_an_export_takes_up_weights_alone_from_one_that_was_killed(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(to_hf_module, "verify_export", die)
        with pytest.raises(Killed):
            to_hf(made / "import", tmp_path / "out", words)
    weights = tmp_path / ".out.partial" / "model.safetensors"
    (tmp_path / ".out.partial" / "merges.txt").touch()  # of a tokenizer of another kind
    kept = weights.stat().st_ino
    out = to_hf(made / "import", tmp_path / "out", words, chat_template="own", logits=False)
    assert (out / "model.safetensors").stat().st_ino == kept
    fresh = to_hf(made / "import", tmp_path / "fresh", words, chat_template="own", logits=False)
    assert {path.name for path in out.iterdir()} == {path.name for path in fresh.iterdir()}


def test_what_was_made_for_another_model_is_not_taken_up(tmp_path: Path) -> None:
    plan = {"model": 1}
    with pytest.raises(Killed), output.continued(tmp_path / "out", plan, ("*.safetensors",)) as folder:
        (folder / "a.safetensors").touch()
        raise Killed
    with pytest.raises(Killed), output.continued(tmp_path / "out", plan, ("*.safetensors",)) as folder:
        assert (folder / "a.safetensors").exists()
        raise Killed
    with output.continued(tmp_path / "out", {"model": 2}, ("*.safetensors",)) as folder:
        assert not (folder / "a.safetensors").exists()


def test_a_folder_with_two_models_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}')
    with pytest.raises(BadInput, match="holds two models"):
        from_hf(base, tmp_path / "import", logits=False)


def test_a_tensor_in_two_files_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "model.safetensors", base / "other.safetensors")
    with pytest.raises(BadInput, match=r"is in two files of .*: model\.safetensors and other\.safetensors"):
        from_hf(base, tmp_path / "import", logits=False)


def test_weights_in_a_folder_below_are_refused(base: Path, tmp_path: Path) -> None:
    (base / "sub").mkdir()
    (base / "model.safetensors").rename(base / "sub" / "model.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "sub/model.safetensors"}}')
    with pytest.raises(BadInput, match=r"names 'sub/model\.safetensors'"):
        from_hf(base, tmp_path / "import", logits=False)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("tokenizer.json", content) for content in ("{}", "[]", "null", '{"model": {"type": "New"}}')),
        *(("tokenizer_config.json", content) for content in ("[]", "null", '{"tokenizer_class": 5}')),
        ("tokenizer_config.json", '{"extra_special_tokens": 3}'),
        ("special_tokens_map.json", "[1]"),
    ],
)
def test_a_tokenizer_that_makes_no_sense_is_refused_and_an_import_does_without(
    made: Path, words: Path, tmp_path: Path, file: str, content: str
) -> None:
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    for folder in (base, Path(shutil.copytree(words, tmp_path / "words"))):
        (folder / file).write_text(content)
    with pytest.raises(BadInput, match="cannot be loaded"):
        to_hf(made / "import", tmp_path / "out", tmp_path / "words", logits=False)
    assert not list(tmp_path.glob("*out*"))
    assert from_hf(base, tmp_path / "import")


def test_no_eos_in_the_generation_settings_leaves_the_tokenizers(made: Path, words: Path, tmp_path: Path) -> None:
    tokenizer = Path(shutil.copytree(words, tmp_path / "words"))
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": null}')
    out = to_hf(made / "import", tmp_path / "out", tokenizer, logits=False)
    assert rundir.read_json(out / "generation_config.json")["eos_token_id"] == 2


@pytest.mark.parametrize("content", [{"a": 1}, 7, [torch.zeros(16)], torch.zeros(16, device="meta")])
def test_a_record_that_is_no_tensor_is_refused(made: Path, words: Path, tmp_path: Path, content: object) -> None:
    spoilt = Path(shutil.copytree(made / "import", tmp_path / "spoilt"))
    _replace_record(spoilt, content)
    with pytest.raises(BadInput, match=f"holds no numbers for {NORM}"):
        to_hf(spoilt, tmp_path / "out", words, verify=False)


def test_a_record_that_is_packed_is_refused(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = Path(shutil.copytree(made / "import", tmp_path / "spoilt"))
    _replace_record(spoilt, Save(spoilt).read(NORM).clone())
    infolist = zipfile.ZipFile.infolist

    def deflated(self: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        for each in (found := infolist(self)):
            each.compress_type = zipfile.ZIP_DEFLATED
        return found

    Save(spoilt).read(NORM)
    monkeypatch.setattr(zipfile.ZipFile, "infolist", deflated)
    with pytest.raises(BadInput, match=f"holds no numbers for {NORM}"):
        Save(spoilt).read(NORM)


def _replace_record(folder: Path, content: object) -> None:
    """Put `content` in the place of the last norm, at the end of its file."""
    index = torch_dist.read_index(folder)
    where = next(key for key in index.storage_data if key.fqn == NORM)
    path = folder / index.storage_data[where].relative_path
    with path.open("ab") as file:
        start = file.tell()
        torch.save(content, file)
        info = replace(index.storage_data[where], offset=start, length=file.tell() - start)
    index.storage_data[where] = info
    (folder / torch_dist.INDEX).write_bytes(torch_dist.pickle.dumps(index))


def test_a_disk_is_measured_where_a_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "far" / "away")
    asked: list[Path] = []
    monkeypatch.setattr(rundir, "free_bytes", lambda folder: asked.append(folder) or 1 << 40)
    output.check_room(tmp_path / "out", 5)
    assert asked == [tmp_path / "far" / "away"]


@pytest.mark.parametrize("place", ["/", "/proc"])
def test_a_disk_of_its_own_is_no_output(base: Path, place: str) -> None:
    with pytest.raises(BadInput, match=r"is a disk of its own|holds something else"):
        from_hf(base, Path(place))


def test_an_output_below_links_that_go_round_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(BadInput, match="leads nowhere"):
        from_hf(base, tmp_path / "a" / "import")


def test_a_number_that_the_format_cannot_hold_is_refused(base: Path, words: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e5
    save_file(weights, base / "model.safetensors")
    save = from_hf(base, tmp_path / "import", logits=False)
    with pytest.raises(BadInput, match=r"lm_head\.weight has numbers too large for torch\.float16"):
        to_hf(save, tmp_path / "out", words, dtype="fp16", logits=False)
    assert to_hf(save, tmp_path / "out", words, logits=False)


def test_a_comparison_that_could_not_be_made_leaves_no_old_report(made: Path, words: Path, tmp_path: Path) -> None:
    out = to_hf(made / "import", tmp_path / "out", words, logits=False)
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(BadInput):
        verify.verify(made / "import", out, logits=False, into=out)
    assert not (out / verify.REPORT).exists()


def test_the_logits_of_a_large_vocabulary_are_compared_in_parts(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: set[int] = set()
    softmax = torch.Tensor.log_softmax

    def noted(self: torch.Tensor, dim: int) -> torch.Tensor:
        rows.add(len(self))
        return softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", noted)
    random_base(RandomBaseConfig(model=MODEL, tokenizer=words, output=tmp_path / "base"))
    from_hf(tmp_path / "base", tmp_path / "import")
    assert max(rows) == verify.COMPARED
    assert rundir.read_json(tmp_path / "import" / verify.REPORT)["num_positions"] == verify.POSITIONS


def test_logits_count_as_memory_that_whole_models_need(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = verify.FP32_BYTES * verify.SPARE * MODEL.num_parameters
    monkeypatch.setattr(verify, "available_bytes", lambda: int(2 * models))
    from_hf(base, tmp_path / "import")
    assert rundir.read_json(tmp_path / "import" / verify.REPORT)["streamed"]


def test_a_dry_run_refuses_an_output_that_holds_something_else(base: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(["convert", "from-hf", str(base), str(tmp_path / "taken"), "--dry-run"]) == 2
