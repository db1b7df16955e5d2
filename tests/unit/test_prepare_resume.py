"""The same bytes for any number of workers, and after kill -9 at any moment and a rerun."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo.config.base import to_dict
from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.prepare import PROGRESS, prepare
from megatron_octo.data.verify import verify
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.rundir import LOCK, read_json, write_json
from tests.conftest import REPOSITORY, snapshot

FILES = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, corpora) -> Path:
    """Three files of records with all that a resume must carry on: ids, bad records, control texts."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = (corpora / "short.jsonl").read_text().splitlines()
    for number in range(FILES):
        rows = [{**json.loads(line), "id": f"{number}-{at}"} for at, line in enumerate(lines[number::FILES])]
        rows[number + 5]["answer"] += " </s> is text"
        texts = [json.dumps(row) for row in rows]
        texts[number + 20] = '{"question": "alone"}'
        (folder / f"part{number}.jsonl").write_text("\n".join(texts) + "\n")
    return folder


@pytest.fixture
def config(inputs, tokenizer_folder, tmp_path) -> PrepareConfig:
    """Small shards: dozens of them."""
    return PrepareConfig(
        name="short",
        input=inputs / "*.jsonl",
        template="question_answer",
        tokenizer=tokenizer_folder,
        output=tmp_path / "out",
        id_column="id",
        mark_answers=True,
        validation_share=0.1,
        on_bad_record="skip",
        shard_tokens=1000,
        piece_bytes=1500,
    )


def content(folder: Path) -> dict[str, str]:
    """Every file but those that name the folder or the process."""
    return {name: value for name, value in snapshot(folder).items() if name not in (LOCK, "config.json")}


@pytest.fixture
def whole(config) -> dict[str, str]:
    """What one undisturbed worker writes."""
    config = replace(config, output=config.output.with_name("whole"))
    manifest = prepare(config, num_workers=1)
    assert len(manifest.shards) > 20
    assert len(manifest.validation) > 3
    assert manifest.rejected == FILES
    assert manifest.control_texts == (("</s>", FILES),)
    verify(config.output)
    return content(config.output)


@pytest.mark.parametrize("num_workers", [2, 5])
def test_any_number_of_workers_writes_the_same_bytes(config, whole, num_workers):
    prepare(config, num_workers=num_workers)
    assert content(config.output) == whole


def finished(config: PrepareConfig) -> int:
    """Shards that a rerun need not write again."""
    path = config.output / PROGRESS
    return len(read_json(path)["shards"]) if path.exists() else 0


@pytest.mark.parametrize("num_kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_after_kills_anywhere_a_rerun_writes_the_same_bytes(config, whole, num_kills, tmp_path):
    write_json(tmp_path / "config.json", to_dict(config))
    draw, resumed = random.Random(num_kills), 0
    for _ in range(num_kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_octo", "data", "prepare", str(tmp_path / "config.json"), "--workers", "2"],
            cwd=REPOSITORY,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        before = finished(config)
        while draw.random() < 0.999 and finished(config) == before and process.poll() is None:  # or while it starts
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (config.output / "DONE").exists():  # too late: begin again
            prepare(config)
            assert content(config.output) == whole
            for path in config.output.iterdir():
                path.unlink()
        elif (config.output / PROGRESS).exists():
            resumed += 1
    prepare(config, num_workers=2)
    assert content(config.output) == whole
    assert resumed


def test_a_stop_at_a_bad_record_keeps_the_finished_shards_and_a_mended_file_is_begun_anew(config, inputs, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text((inputs / "part0.jsonl").read_text() + "{torn\n")
    config = replace(config, input=own, most_bad_share=0.0, on_bad_record="stop", id_column=None)
    lines = own.read_text().splitlines()
    own.write_text("\n".join([*lines[:20], *lines[21:]]) + "\n")  # only the torn line is bad
    with pytest.raises(BadInput, match=rf"own\.jsonl, line {len(lines) - 1:,}: malformed JSON"):
        prepare(config, num_workers=2)
    assert len(read_json(config.output / PROGRESS)["shards"]) > 3
    own.write_text("\n".join([*lines[:20], *lines[21:-1]]) + "\n")
    with pytest.raises(BadInput, match=r"own\.jsonl changed since"):
        prepare(config)


def test_after_a_stop_at_a_bad_record_a_rerun_that_skips_it_goes_on(config, tmp_path):
    config = replace(config, shard_tokens=100, piece_bytes=500)
    with pytest.raises(BadInput, match="on_bad_record='skip'"):
        prepare(replace(config, on_bad_record="stop"), num_workers=2)
    assert finished(config) > 0
    with pytest.raises(BadInput, match=r"template: 'question_answer' in the folder"):
        prepare(replace(config, template="chat"))
    prepare(config, num_workers=2)
    assert read_json(config.output / "config.json")["on_bad_record"] == "skip"
    again = replace(config, output=tmp_path / "again")
    prepare(again, num_workers=1)
    assert content(config.output) == content(again.output)
    with pytest.raises(BadInput, match=r"on_bad_record: 'skip' in the folder, 'stop' asked for"):
        prepare(replace(config, on_bad_record="stop"))


def test_records_that_were_left_out_are_not_forgotten_by_a_rerun_that_may_leave_out_none(config):
    config = replace(config, shard_tokens=100, piece_bytes=500)
    with pytest.raises(BadInput):
        prepare(replace(config, on_bad_record="stop"), num_workers=1)
    write_json(config.output / PROGRESS, {**read_json(config.output / PROGRESS), "rejected": 1})
    with pytest.raises(BadInput, match="left out 1 records"):
        prepare(replace(config, on_bad_record="stop"))


def test_a_file_that_no_finished_shard_took_from_may_be_corrected(config, inputs, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    texts = {path.name: "".join(path.read_text().splitlines(keepends=True)[:20]) for path in inputs.iterdir()}
    for name, text in texts.items():
        (own / name).write_text("{torn\n" + text if name == "part2.jsonl" else text)
    config = replace(config, input=own / "*.jsonl", on_bad_record="stop", validation_share=0.0, shard_tokens=200)
    with pytest.raises(BadInput, match=r"part2\.jsonl, line 1: malformed JSON"):
        prepare(config, num_workers=1)
    assert finished(config) > 1
    (own / "part2.jsonl").write_text(texts["part2.jsonl"])
    (own / "part3.jsonl").write_text(texts["part0.jsonl"])
    written = (own / "part0.jsonl").stat().st_mtime_ns
    os.utime(own / "part0.jsonl", ns=(0, 0))
    with pytest.raises(BadInput, match=r"part0\.jsonl changed since"):
        prepare(config)
    os.utime(own / "part0.jsonl", ns=(written, written))
    prepare(config, num_workers=2)
    again = replace(config, output=tmp_path / "again")
    assert len(prepare(again, num_workers=1).sources) == FILES + 1
    assert content(config.output) == content(again.output)
    verify(config.output)


def test_a_file_that_changes_while_it_is_read_is_found(config, inputs, tmp_path, monkeypatch):
    own = tmp_path / "own.jsonl"
    own.write_text((inputs / "part1.jsonl").read_text())
    from megatron_octo.data import prepare as module

    whole = module.pieces

    def pieces(path, **options):
        yield from whole(path, **options)
        with path.open("a") as file:
            file.write("\n")

    monkeypatch.setattr(module, "pieces", pieces)
    with pytest.raises(BadInput, match=r"own\.jsonl changed while it was read"):
        prepare(replace(config, input=own), num_workers=1)


def test_a_full_disk_keeps_the_finished_shards_and_a_rerun_goes_on(config, whole, tmp_path):
    write_json(tmp_path / "config.json", to_dict(config))
    # the largest file that a process may write: after some shards progress.json reaches it
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); "
    code = limited + "from megatron_octo.cli.app import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "prepare", str(tmp_path / "config.json")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "no room on the disk" in done.stderr
    assert "Traceback" not in done.stderr
    assert finished(config) > 2
    prepare(config, num_workers=2)
    assert content(config.output) == whole


def test_a_dead_worker_is_said_and_a_rerun_goes_on(config, whole, monkeypatch):
    from megatron_octo.data import prepare as module

    make = module.encoder

    def dying(settings, tokenizer, **options):
        encode, seen = make(settings, tokenizer, **options), []

        def function(piece):
            seen.append(piece)
            if len(seen) == 20:
                signal.raise_signal(signal.SIGKILL)
            return encode(piece)

        return function

    monkeypatch.setattr(module, "encoder", dying)
    with pytest.raises(OctoError, match="a worker process died"):
        prepare(config, num_workers=2)
    monkeypatch.undo()
    prepare(config, num_workers=2)
    assert content(config.output) == whole


def test_another_process_that_prepares_it_is_refused(config):
    from megatron_octo.rundir import lock

    with lock(config.output), pytest.raises(BadInput, match="in use"):
        prepare(config)
