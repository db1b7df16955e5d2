"""Saves of a run: what is taken, what stays, what a kill leaves, and going back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_octo import lineage, rundir
from megatron_octo.config.rl import RLConfig
from megatron_octo.lineage import Lineage
from megatron_octo.rl import saves
from megatron_octo.rl.collect import Row


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs to be on the disk itself."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def row(step: int, **values: float) -> Row:
    named = {name.replace("_", "/", 1): value for name, value in values.items()}
    return {"step": step, "rl/response_length_mean": 10.0, "rl/reward_mean": 0.0, **named}


def openrlhf_saves(config: RLConfig, step: int, *, copy: bool = True) -> Path:
    """Leave a checkpoint, and the Hugging Face copy of it, as OpenRLHF does; returns the copy's folder."""
    actor = config.output / "openrlhf/_actor"
    (actor / f"global_step{step}").mkdir(parents=True)
    for name in ("model", "optimizer"):
        (actor / f"global_step{step}" / name).touch()
    (actor / "latest").write_text(f"global_step{step}")
    folder = config.output / f"openrlhf/global_step{step}_hf"
    if copy:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(f"weights {step}".encode())
        (folder / "tokenizer.json").write_text("{}")
    return folder


def run_to(config: RLConfig, rows: list[Row]) -> None:
    """Save at each of these steps and look after the saves."""
    for end, each in enumerate(rows, start=1):
        openrlhf_saves(config, int(each["step"]))
        saves.take(config, rows[:end])


def test_a_copy_is_whole_has_its_lineage_and_openrlhf_s_is_gone(config: RLConfig) -> None:
    lineage.write(config.model, Lineage(name="branch", kind="export", weights_sha256="x", tokens=7))
    (config.model / "LICENSE").write_text("terms")
    source = openrlhf_saves(config, 2)
    saves.take(config, [row(1), row(2)])
    folder = saves.copy_folder(config.output, 2)
    assert rundir.is_done(folder) and not source.exists()
    assert (folder / "generation_config.json").read_bytes() == (config.model / "generation_config.json").read_bytes()
    assert (folder / "LICENSE").read_text() == "terms"
    link = lineage.read(folder)
    assert [(each.name, each.kind) for each in link.chain()] == [("branch", "export"), ("test-rl", "rl")]
    assert (link.step, link.tokens) == (2, 2 * 16 * 10)
    assert link.weights_sha256 == rundir.sha256_folder(folder, "*.safetensors")


@pytest.mark.parametrize("tokenizer", [None, '{"model": {"voc'])
def test_a_copy_that_openrlhf_still_writes_is_left_alone(config: RLConfig, tokenizer: str | None) -> None:
    source = openrlhf_saves(config, 1)
    (source / "tokenizer.json").unlink()
    if tokenizer is not None:
        (source / "tokenizer.json").write_text(tokenizer)
    saves.take(config, [row(1)])
    assert source.exists() and saves.copies(config.output) == []


def test_a_copy_waits_for_the_numbers_of_its_step(config: RLConfig) -> None:
    openrlhf_saves(config, 2)
    saves.take(config, [row(1)])
    assert saves.copies(config.output) == []
    saves.take(config, [row(1), row(2)])
    assert saves.copies(config.output) == [2]


def test_the_last_saves_stay_and_the_best_copy(config: RLConfig) -> None:
    rewards = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.4, 5: 0.2}
    run_to(config, [row(step, rl_reward_mean=value) for step, value in rewards.items()])
    assert saves.copies(config.output) == [2, 4, 5]
    assert saves.checkpoints(config.output) == [4, 5]
    assert rundir.read_json(config.output / "saves/best.json") == {"step": 2, "by": "reward", "value": 0.9}


def test_a_checkpoint_that_openrlhf_still_writes_counts_for_none(config: RLConfig) -> None:
    for step in (1, 2, 3):
        openrlhf_saves(config, step)
    (config.output / "openrlhf/_actor/global_step4").mkdir()
    saves.take(config, [row(1), row(2), row(3)])
    assert saves.checkpoints(config.output) == [2, 3, 4]


def test_validation_says_which_is_best_where_there_is_one(config: RLConfig) -> None:
    rows = [row(step, rl_reward_mean=0.1 * step) for step in range(1, 6)]
    rows[0] |= {"valid/math500/accuracy": 0.3, "valid/amc23/accuracy": 0.5}
    rows[2] |= {"valid/math500/accuracy": 0.3, "valid/amc23/accuracy": 0.3}
    run_to(config, rows)
    assert saves.copies(config.output) == [1, 4, 5]
    assert rundir.read_json(config.output / "saves/best.json") == {"step": 1, "by": "validation", "value": 0.4}


def test_of_equally_good_copies_the_later_is_best() -> None:
    assert saves.best([1, 2], [row(1), row(2), row(3, rl_reward_mean=5.0)]) == (2, "reward", 0.0)
    assert saves.best([1], []) is None


def test_a_run_goes_on_after_its_last_whole_checkpoint_and_older_ones_stay(config: RLConfig) -> None:
    for step in (1, 2):
        openrlhf_saves(config, step)
    torn = config.output / "openrlhf/_actor/global_step3"
    torn.mkdir()
    assert saves.resume(config.output) == 2
    assert saves.checkpoints(config.output) == [1, 2] and not torn.exists()


def test_a_kill_while_latest_is_written_loses_nothing(config: RLConfig) -> None:
    for step in (1, 2):
        openrlhf_saves(config, step)
    latest = config.output / "openrlhf/_actor/latest"
    latest.write_text("")
    assert saves.resume(config.output) == 2
    assert latest.read_text() == "global_step2"


def test_a_copy_that_a_kill_tore_is_removed_and_a_whole_one_is_taken_later(config: RLConfig) -> None:
    torn, whole = openrlhf_saves(config, 1), openrlhf_saves(config, 2)
    (torn / "tokenizer.json").write_text("{")
    assert saves.resume(config.output) == 2
    assert not torn.exists() and whole.exists()
    saves.take(config, [row(1), row(2)])
    assert saves.copies(config.output) == [2]


def test_a_kill_while_a_copy_is_made_or_deleted_leaves_none_that_is_torn(
    config: RLConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file operation in turn the run dies; then it goes on."""
    for deadly in range(1, 40):
        shutil.rmtree(config.output, ignore_errors=True)
        rows = [row(step) for step in (1, 2, 3)]
        run_to(config, rows[:2])
        openrlhf_saves(config, 3)  # 1 no longer stays
        with monkeypatch.context() as patch:
            count = die_at(patch, deadly)
            try:
                saves.take(config, rows)
                died = False
            except KeyboardInterrupt:
                died = True
        assert saves.resume(config.output) == 3
        assert not list(config.output.rglob(".*.trash")), deadly
        for step in saves.checkpoints(config.output):
            assert len(list((config.output / f"openrlhf/_actor/global_step{step}").iterdir())) == 2, (deadly, step)
        for step in saves.copies(config.output):
            folder = saves.copy_folder(config.output, step)
            assert rundir.is_done(folder) and (folder / "tokenizer.json").exists(), (deadly, step)
            assert lineage.read(folder).weights_sha256 == rundir.sha256_folder(folder, "*.safetensors")
        saves.take(config, rows)
        saves.rotate(config, rows)
        assert saves.copies(config.output) == saves.checkpoints(config.output) == [2, 3]
        if not died:
            assert count() < deadly and deadly > 10
            return
    raise AssertionError("the operations never came to an end")


def test_openrlhf_meets_no_checkpoint_that_is_being_deleted(config: RLConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, seen, rmtree = config.output / "openrlhf/_actor", [], shutil.rmtree

    def removed(folder: Path) -> None:
        seen.append(folder.name)
        assert sorted(path.name for path in actor.iterdir()) == ["global_step2", "global_step3", "latest"]
        rmtree(folder)

    for step in (1, 2, 3):
        openrlhf_saves(config, step, copy=False)
    monkeypatch.setattr(shutil, "rmtree", removed)
    saves.rotate(config, [])
    assert seen == [".global_step1.trash"]


def die_at(patch: pytest.MonkeyPatch, deadly: int) -> Callable[[], int]:
    """Have the `deadly`-th copy, rename or removal of files die, a removal half-way; returns their count."""
    done = 0

    def mortal(function: Callable[..., object], half: Callable[..., object] = lambda *_: None) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal done
            done += 1
            if done == deadly:
                half(*args)
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    patch.setattr(shutil, "copy2", mortal(shutil.copy2))
    patch.setattr(
        shutil, "rmtree", mortal(shutil.rmtree, lambda folder: [path.unlink() for path in [*folder.glob("*")][:1]])
    )
    patch.setattr(Path, "replace", mortal(Path.replace))
    return lambda: done


def test_going_back_undoes_later_saves(replaced: Callable[..., RLConfig]) -> None:
    config = replaced(keep_last_saves=3)
    for step in (1, 2, 3):
        openrlhf_saves(config, step)
    saves.take(config, [row(1), row(2)])
    saves.go_back(config.output, 1)
    assert saves.checkpoints(config.output) == saves.copies(config.output) == [1]
    assert (config.output / "openrlhf/_actor/latest").read_text() == "global_step1"
    assert not (config.output / "saves/best.json").exists()
    assert not list((config.output / "openrlhf").glob("global_step*_hf"))
    assert saves.resume(config.output) == 1


def test_a_run_killed_in_its_first_save_has_none(config: RLConfig) -> None:
    (config.output / "openrlhf/_actor/global_step1").mkdir(parents=True)
    assert saves.resume(config.output) == 0
    assert not (config.output / "openrlhf/_actor").exists()
