"""`octo convert`: each of its commands, their defaults, dry runs and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import checksums, lineage, rundir
from megatron_octo.cli import app
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.convert import from_hf
from tests.conftest import REPOSITORY, flip_bit, snapshot, word_tokenizer

RECIPE = f"{REPOSITORY / 'recipes/miniature.py'}:pipeline"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def convert(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `octo convert ARGS` in this process; returns exit code, stdout and stderr."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the command sets it; this undoes that

    def run(*args: object) -> tuple[int, str, str]:
        code = app.main(["convert", *map(str, args)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def miniature(runs: Path) -> Path:
    """The miniature's folder, with a tokenizer in it."""
    return word_tokenizer(runs / "miniature/tokenizer").parent


@pytest.fixture
def run_folder(convert: Run, miniature: Path) -> Path:
    """The miniature's random base, imported, as the save of a run after step 5."""
    assert convert("random-base", RECIPE)[0] == 0
    save = rundir.step_folder(miniature.parent / "stage", 5)
    assert convert("from-hf", miniature / "base", save, "--skip-logits")[0] == 0
    rundir.write_json(save / "config.json", {"data": {"tokenizer": str(miniature / "tokenizer")}})
    return miniature.parent / "stage"


@pytest.mark.parametrize("command", ["from-hf", "to-hf", "verify", "random-base"])
def test_each_command_has_help(convert: Run, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        convert(command, "--help")
    assert left.value.code == 0
    assert "--dry-run" in capfd.readouterr().out


def test_the_last_save_of_a_run_is_exported_and_verified(convert: Run, run_folder: Path) -> None:
    code, answer, log = convert("to-hf", run_folder, "--json")
    assert code == 0, log
    said, out = json.loads(answer), run_folder / "hf/step_00000005"
    assert (said["output"], said["dtype"], said["num_parameters"]) == (str(out), "bf16", 1_033_344)
    report = rundir.read_json(out / "verify.json")
    assert rundir.is_done(out) and report["num_positions"] >= 1000
    assert report["tokens"] == "random tokens, since the tokenizer makes too little of sample.txt"
    assert "tensors bit-identical" in log and report["tokens"] in log
    assert (out / "tokenizer.json").read_bytes() == (
        run_folder.parent / "miniature/tokenizer/tokenizer.json"
    ).read_bytes()


def test_where_no_folder_is_given_that_of_a_llama_begins_with_llama(convert: Run, run_folder: Path) -> None:
    save = rundir.step_folder(run_folder, 5)
    llama = lineage.Lineage(name="Llama-3.2-1B", kind="base", weights_sha256="")
    lineage.write(save, replace(lineage.read(save), name="stage", parent=llama))
    code, out, _ = convert("to-hf", run_folder, "--skip-verify")
    assert (code, out) == (0, f"{run_folder / 'hf/Llama-3.2-stage-step_00000005'}\n")
    assert (Path(out.strip()) / "README.md").read_text().startswith("# Llama-3.2-stage\n")


def test_an_unverified_export_holds_no_report(convert: Run, run_folder: Path, tmp_path: Path) -> None:
    code, out, _ = convert("to-hf", run_folder, tmp_path / "out", "--dtype", "fp32", "--skip-verify")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert rundir.is_done(tmp_path / "out") and not (tmp_path / "out/verify.json").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "Not verified" in card and "verify.json" not in card


def test_a_proof_of_the_weights_alone_runs_no_model(convert: Run, run_folder: Path, tmp_path: Path) -> None:
    assert convert("to-hf", run_folder, tmp_path / "out", "--skip-logits")[0] == 0
    report = rundir.read_json(tmp_path / "out/verify.json")
    assert report["num_tensors"] > 20 and report["num_positions"] == 0
    assert "`verify.json` holds the comparison" in (tmp_path / "out/README.md").read_text()
    code, out, _ = convert("verify", run_folder, tmp_path / "out", "--skip-logits")
    assert (code, out) == (0, f"verified: {report['num_tensors']} tensors bit-identical; logits not compared\n")


def test_a_comparison_is_stored_in_an_export_and_a_folder_of_the_users_stays_as_it_is(
    convert: Run, run_folder: Path, miniature: Path, tmp_path: Path
) -> None:
    assert convert("to-hf", run_folder, tmp_path / "out", "--skip-verify")[0] == 0
    for folder, file, stored in (
        (tmp_path / "out", str(tmp_path / "out/verify.json"), True),
        (miniature / "base", "stdout", False),
    ):
        code, out, _ = convert("verify", run_folder, folder, "--dry-run", "--json")
        assert (code, json.loads(out)["output"]) == (0, file)
        code, out, _ = convert("verify", run_folder, folder, "--skip-logits")
        assert code == 0 and out.startswith("verified: ")
        assert (folder / "verify.json").exists() == stored


@pytest.mark.parametrize("more", [(), ("--skip-logits",)])
def test_an_import_is_compared_on_the_text_that_is_given(
    convert: Run, miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(from_hf, "verify_import", lambda *folders, **options: asked.append(options))
    (tmp_path / "text").write_text("text")
    assert convert("random-base", RECIPE)[0] == 0
    assert convert("from-hf", miniature / "base", tmp_path / "out", "--text", tmp_path / "text", *more)[0] == 0
    (options,) = asked
    assert (options["logits"], options["text"]) == (not more, tmp_path / "text")


def test_a_random_base_comes_from_json_too(convert: Run, miniature: Path, tmp_path: Path) -> None:
    base = load_recipe(RECIPE, PipelineConfig).base
    assert base is not None
    rundir.write_json(tmp_path / "base.json", to_dict(base))
    assert convert("random-base", tmp_path / "base.json")[0] == 0
    assert rundir.is_done(miniature / "base")


def test_dry_runs_write_nothing(convert: Run, run_folder: Path, miniature: Path) -> None:
    runs = miniature.parent
    before = snapshot(runs)
    for args in (
        ("from-hf", miniature / "base", runs / "new"),
        ("to-hf", run_folder),
        ("verify", run_folder, miniature / "base"),
        ("random-base", RECIPE),
    ):
        code, out, _ = convert(*args, "--dry-run")
        assert (code, out.splitlines()[0]) == (0, f"would run {args[0]}:")
        code, out, _ = convert(*args, "--dry-run", "--json")
        assert (code, json.loads(out)["dry_run"]) == (0, True)
    assert snapshot(runs) == before


def test_bad_input_is_told_and_changes_nothing(convert: Run, run_folder: Path, miniature: Path) -> None:
    runs = miniature.parent
    save, base = rundir.step_folder(run_folder, 5), miniature / "base"
    foreign = Path(shutil.copytree(base, runs / "foreign"))
    config = rundir.read_json(foreign / "config.json")
    rundir.write_json(foreign / "config.json", {**config, "model_type": "llama4"})
    for name, changes in {
        "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "large": {"vocab_size": config["vocab_size"] + 1},
    }.items():
        shutil.copytree(base, runs / name)
        rundir.write_json(runs / name / "config.json", {**config, **changes})
    cut = Path(shutil.copytree(base, runs / "cut"))
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1])
    torn, flipped = (Path(shutil.copytree(save, rundir.step_folder(run_folder, step))) for step in (6, 7))
    for folder in (torn, flipped):
        (folder / "DONE").unlink()
    checksums.seal(flipped, {})
    (weights,) = flipped.glob("*.distcp")
    flip_bit(weights)
    (runs / "notes").mkdir()
    (runs / "notes/a.txt").write_text("kept")
    before = snapshot(runs)
    cases = {
        ("from-hf", runs / "absent", runs / "out"): "no such folder",
        ("from-hf", foreign, runs / "out"): "model_type 'llama4' is not supported\n  fix: did you mean 'llama'?",
        ("from-hf", runs / "yarn", runs / "out"): "rotary scaling of type 'yarn'",
        ("from-hf", runs / "large", runs / "out"): "embed_tokens.weight is",
        ("from-hf", cut, runs / "out"): "model.safetensors cannot be read",
        ("from-hf", base, runs / "notes"): "holds something else",
        ("from-hf", base, runs / "notes", "--overwrite"): "holds something else",
        ("from-hf", base, runs / "out", "--text", runs / "absent.txt"): "no such file",
        ("to-hf", runs / "absent"): "no folder",
        ("to-hf", base, runs / "out"): "no whole save",
        ("to-hf", torn, runs / "out"): "is damaged: it has no DONE",
        ("to-hf", flipped, runs / "out"): f"is damaged: {weights.name} is not as it was written",
        ("verify", flipped, base): f"is damaged: {weights.name} is not as it was written",
        ("to-hf", save, runs / "out", "--tokenizer", runs / "notes"): "no tokenizer",
        ("to-hf", save, run_folder): "holds something else",
        ("verify", save, runs / "notes"): "no *.safetensors",
        ("verify", save, base, "--text", runs / "absent.txt"): "no such file",
        ("random-base", f"{RECIPE[:-8]}stable"): "describes no random base",
    }
    for args, told in cases.items():
        code, _, err = convert(*args)
        assert code == 2, (args, err)
        assert told in err and "fix:" in err
    assert snapshot(runs) == before


def test_an_import_outside_of_a_run_needs_to_be_told_where_to(convert: Run, run_folder: Path, tmp_path: Path) -> None:
    imported = shutil.copytree(rundir.step_folder(run_folder, 5), tmp_path / "import")
    assert "to-hf SAVE OUT" in convert("to-hf", imported)[2]
    (imported / "config.json").unlink()
    code, _, err = convert("to-hf", imported, tmp_path / "out")
    assert (code, "give --tokenizer FOLDER" in err) == (2, True)
