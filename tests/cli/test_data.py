"""`octo data`: a recipe or a pipeline in, folders out; dry runs touch nothing; machine output is JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_octo.cli import app
from megatron_octo.data.indexed import IndexedWriter
from megatron_octo.data.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY, snapshot

MINIATURE = REPOSITORY / "recipes" / "miniature.py"
Data = Callable[..., tuple[int, str]]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The miniature's recipes with corpora of 300 documents."""
    text, changes = re.subn(r"(?m)^DOCUMENTS = .*", "DOCUMENTS = dict.fromkeys(TEMPLATES, 300)", MINIATURE.read_text())
    assert changes == 1
    (tmp_path / "small.py").write_text(text)
    return str(tmp_path / "small.py")


@pytest.fixture
def data(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Data:
    """Run `octo data ARGS` in this process; return its exit code and stdout."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: object) -> tuple[int, str]:
        capsys.readouterr()
        code = app.main(["data", *map(str, args)])
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def message(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `octo data ARGS`, which must be refused; return the message."""

    def run(*args: object) -> str:
        assert app.main(["data", *map(str, args)]) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def written(data: Data, recipe: str, runs: Path) -> Path:
    """The miniature's folder with small corpora, tokenizer and data sets."""
    for command in ("generate", "tokenizer", "prepare"):
        assert data(command, recipe)[0] == 0
    return runs / "miniature"


def test_the_miniatures_pipeline_is_prepared_command_by_command(data, written, recipe):
    assert {path.name for path in written.iterdir()} == {"corpora", "tokenizer", "data"}
    code, out = data("prepare", recipe, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["source"] for row in rows] == ["web", "short", "long", "chat"]
    assert all(row["documents"] == 300 and row["rejected"] == 0 for row in rows)
    per_document = {row["source"]: row["tokens_per_document"] for row in rows}
    assert per_document == pytest.approx({"web": 53, "short": 39, "long": 69, "chat": 41}, abs=3)


def test_a_second_run_changes_nothing(data, written, recipe):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    for command in ("generate", "tokenizer", "prepare"):
        assert data(command, recipe)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_other_settings_are_refused(written, message, recipe):
    before = snapshot(written)
    assert "seed: 0 in the folder, 1 asked for" in message("generate", recipe, "--corpora.seed", "1")
    assert "vocab_size: 384 in the folder, 380 asked for" in message(
        "tokenizer", recipe, "--tokenizer.vocab-size", "380"
    )
    assert "eos: True in the folder, False asked for" in message("prepare", recipe, "--prepare.2.no-eos")
    assert snapshot(written) == before


def test_a_dry_run_touches_nothing_and_says_what_would_be_written(data, runs, recipe):
    for command, output in (("generate", "corpora"), ("tokenizer", "tokenizer"), ("prepare", "data/long")):
        code, out = data(command, recipe, "--dry-run")
        assert code == 0
        assert f"would write: {runs / 'miniature' / output}" in out
    assert "not there yet" in out
    code, out = data("prepare", recipe, "--source", "chat", "--dry-run", "--json")
    corpus, tokenizer = runs / "miniature" / "corpora" / "chat.jsonl", runs / "miniature" / "tokenizer"
    plan = {"output": str(runs / "miniature" / "data" / "chat"), "done": False}
    assert json.loads(out) == [{**plan, "missing_inputs": [str(corpus), str(tokenizer)]}]
    assert not runs.exists()


def test_a_dry_run_of_a_corpus_shows_its_licence_size_and_gate_and_asks_nobody(data, runs, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    code, out = data("prepare", str(REPOSITORY / "recipes/corpora.py:numina_math_1_5"), "--dry-run")
    assert code == 0
    assert "AI-MO/NuminaMath" in out
    assert "licence Apache-2.0" in out
    assert "GB to download" in out


def test_a_dry_run_says_what_is_done(data, written, recipe):
    before = snapshot(written)
    for command in ("generate", "tokenizer", "prepare"):
        _, out = data(command, recipe, "--dry-run", "--json")
        assert all(plan["done"] for plan in json.loads(out))
    assert snapshot(written) == before


def test_some_sources_of_a_pipeline_can_be_chosen(data, runs, message, recipe):
    for command in ("generate", "tokenizer"):
        data(command, recipe)
    assert data("prepare", recipe, "--source", "long", "web")[0] == 0
    assert sorted(path.name for path in (runs / "miniature" / "data").iterdir()) == ["long", "web"]
    assert "no source 'weeb'\n  fix: choose among: web, short, long, chat" in message(
        "prepare", recipe, "--source", "weeb"
    )


def test_no_source_is_written_when_one_of_them_cannot_be(data, runs, message, recipe):
    for command in ("generate", "tokenizer"):
        data(command, recipe)
    chat = runs / "miniature" / "corpora" / "chat.jsonl"
    chat.unlink()
    assert str(chat) in message("prepare", recipe)
    assert not (runs / "miniature" / "data").exists()


def test_a_data_sets_own_config_is_a_recipe(data, written, tmp_path):
    config = written / "data" / "web" / "config.json"
    _, out = data("prepare", config, "--dry-run", "--json")
    assert json.loads(out) == [{"output": str(written / "data" / "web"), "done": True, "missing_inputs": []}]
    copy = tmp_path / "web.json"
    copy.write_text(json.dumps({**json.loads(config.read_text()), "output": str(tmp_path / "web")}))
    assert data("prepare", copy)[0] == 0
    assert (tmp_path / "web" / "00000.bin").read_bytes() == (written / "data" / "web" / "00000.bin").read_bytes()


def test_a_pipelines_json_is_a_recipe(data, recipe, runs, tmp_path, capsys):
    assert app.main(["recipes", "show", f"{recipe}:pipeline"]) == 0
    (tmp_path / "pipeline.json").write_text(capsys.readouterr().out)
    _, out = data("prepare", tmp_path / "pipeline.json", "--dry-run", "--json")
    assert [plan["output"] for plan in json.loads(out)] == [
        str(runs / "miniature" / "data" / name) for name in ("web", "short", "long", "chat")
    ]


def test_a_recipe_may_return_one_stage_alone(data, tmp_path):
    lines = (
        "from pathlib import Path",
        "from megatron_octo.config.data import SyntheticConfig",
        "def words() -> SyntheticConfig:",
        f"    return SyntheticConfig(output=Path({str(tmp_path / 'words')!r}), documents=(('web', 3),))",
    )
    (tmp_path / "one.py").write_text("\n".join(lines))
    code, out = data("generate", tmp_path / "one.py", "--json")
    assert code == 0
    assert json.loads(out) == {"output": str(tmp_path / "words"), "documents": {"web": 3}}
    assert len((tmp_path / "words" / "web.jsonl").read_text().splitlines()) == 3


def test_inspect_shows_the_manifest_and_documents_as_text(data, written, corpora_line):
    code, out = data("inspect", written / "data" / "long", "--documents", "2", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["manifest"]["documents"] == 300
    assert len(shown["documents"]) == 2
    first = corpora_line(written / "corpora" / "long.jsonl")
    text = f"{first['question']}\n<think>\n{first['thinking']}\n</think>\n{first['answer']}</s>"
    assert shown["documents"][0]["text"] == text
    code, out = data("inspect", written / "data" / "long", "--documents", "1")
    assert code == 0
    assert text in out
    assert "tokenizer.vocab_size" in out


@pytest.fixture
def corpora_line() -> Callable[[Path], dict[str, str]]:
    """The first record of a file."""
    return lambda path: json.loads(path.read_text().split("\n")[0])


def test_inspect_finds_a_tokenizer_that_moved_and_refuses_another(data, written, message, tmp_path):
    folder = written / "data" / "web"
    (written / "tokenizer").rename(tmp_path / "moved")
    assert str(written / "tokenizer") in message("inspect", folder)
    assert data("inspect", folder, "--documents", "0")[0] == 0
    assert data("inspect", folder, "--tokenizer", tmp_path / "moved")[0] == 0
    with (tmp_path / "moved" / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert "another tokenizer" in message("inspect", folder, "--tokenizer", tmp_path / "moved")


def test_a_folder_that_is_no_data_set_is_refused(message, tmp_path):
    assert "octo data prepare" in message("inspect", tmp_path)


def test_a_recipe_of_another_kind_is_refused(message, recipe):
    refused = message("prepare", f"{recipe}:stable")
    assert "MidTrainConfig" in refused
    assert "PrepareConfig or PipelineConfig" in refused


def test_prepared_data_sets_are_verified_merged_and_mixed(data, written, recipe, tmp_path):
    sources = written / "data"
    code, out = data("verify", sources / "web", sources / "chat", "--json")
    assert code == 0
    assert [row["source"] for row in json.loads(out)] == ["web", "chat"]

    again = shutil.copytree(sources / "web", tmp_path / "again")
    code, out = data("merge", tmp_path / "both", sources / "web", again, "--json")
    assert code == 0
    merged = json.loads(out)
    assert (merged["source"], merged["documents"]) == ("both", 600)
    assert data("verify", tmp_path / "both")[0] == 0

    code, out = data("mix", f"{recipe}:stable", "--budget.train-tokens", "51200", "--json")
    assert code == 0
    (plan,) = json.loads(out).values()
    assert [(row["source"], row["tokens"], row["sequences"]) for row in plan] == [
        ("web", 30720, 240),
        ("short", 17920, 140),
        ("chat", 2560, 20),
    ]


def test_a_damaged_data_set_is_found_with_exit_code_1(data, written, capsys):
    path = written / "data" / "web" / "00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert app.main(["data", "verify", str(path.parent)]) == 1
    assert "00000.bin has" in capsys.readouterr().err


def test_a_source_that_would_repeat_too_often_is_refused_by_mix_and_by_training(message, written, recipe, capsys):
    for command in (["data", "mix"], ["train"]):
        assert app.main([*command, f"{recipe}:stable"]) == 2
        refused = capsys.readouterr().err
        assert re.search(r"source web would repeat too often: weight 0\.6 x 1,597,440 tokens = 958,464 of", refused)
        assert "lower its weight to" in refused


def test_workers_below_one_are_refused(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        app.main(["data", "prepare", recipe, "--workers", "0"])
    assert end.value.code == 2
    assert "0 is not at least 1" in capsys.readouterr().err


def test_megatrons_own_tool_by_its_flags_writes_megatrons_files(written, tmp_path):
    """Equal to what megatron-core's own builder writes for the same documents."""
    lines = [{"text": "What is 1+2?", "title": "A"}, {"text": "So 1+2=3. </s>", "title": "B"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--input", tmp_path / "in.jsonl", "--json-keys", "text", "title", "--output-prefix", tmp_path / "out"]
    options += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", written / "tokenizer"]
    command = [sys.executable, "tools/preprocess_data.py", *map(str, options), "--append-eod", "--workers", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(written / "tokenizer")
    for key in ("text", "title"):
        with IndexedWriter(tmp_path / f"expected_{key}", "uint16") as writer:  # byte for byte Megatron's
            for line in lines:
                writer.add([*tokenizer.encode(line[key]), 2])
        for ending in ("bin", "idx"):
            expected = (tmp_path / f"expected_{key}.{ending}").read_bytes()
            assert (tmp_path / f"out_{key}_document.{ending}").read_bytes() == expected
    assert not list(tmp_path.glob("*.work"))
    again = subprocess.run(
        [*command[:3], "nowhere.jsonl", *command[4:]], cwd=REPOSITORY, capture_output=True, check=False
    )
    assert again.returncode == 2
    assert b"no input file nowhere.jsonl" in again.stderr


@pytest.mark.parametrize("command", ["generate", "tokenizer", "prepare", "inspect", "verify", "merge", "mix"])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        app.main(["data", command, "--help"])
    assert end.value.code == 0
    assert f"usage: octo data {command}" in capsys.readouterr().out
