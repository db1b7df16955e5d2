"""What a run keeps: OpenRLHF's checkpoints, to go on from, and whole Hugging Face folders, to use.

    openrlhf/_actor/global_stepN, latest     DeepSpeed's; `latest` is written after all else
    saves/step_N                             Hugging Face, with lineage.json and DONE
    saves/best.json                          which of them is the best, and by what

OpenRLHF's own rotation deletes a checkpoint before its successor is there, and never a Hugging Face copy: both are
rotated here, while it goes on with the next step.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_octo import lineage, rundir
from megatron_octo.config.rl import RLConfig
from megatron_octo.lineage import Lineage
from megatron_octo.rl import collect
from megatron_octo.rl.command import CHECKPOINTS

COPIES, BEST = "saves", "best.json"
COPIED_FILES = ("generation_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")
_ACTOR, _TAG, _COPY, _TRASH = "_actor", "global_step", "_hf", ".trash"


def last(output: Path) -> int:
    """The step of the last whole checkpoint, 0 for none."""
    latest = _actor(output) / "latest"
    if not latest.exists():
        return 0
    steps = checkpoints(output)
    named = [step for step in steps if latest.read_text().strip() == f"{_TAG}{step}"]
    return max(named or steps, default=0)  # it names none if a kill left it empty; then all are whole


def checkpoints(output: Path) -> list[int]:
    """The steps of all checkpoints, in order; those after the last whole one are torn."""
    return sorted(_step(path) for path in _actor(output).glob(f"{_TAG}*") if path.is_dir())


def copies(output: Path) -> list[int]:
    """The steps of all Hugging Face copies, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in (output / COPIES).glob("step_*"))


def copy_folder(output: Path, step: int) -> Path:
    """The Hugging Face copy of a step."""
    return output / COPIES / f"step_{step:08d}"


def resume(output: Path) -> int:
    """The step to go on after. Removes what a kill tore, at which OpenRLHF would stumble, and what came after it."""
    step = last(output)
    go_back(output, step)
    return step


def go_back(output: Path, step: int) -> None:
    """Have the run go on after the checkpoint of `step`, as if later saves had never been. OpenRLHF must not run."""
    actor = _actor(output)
    for folder in (actor.parent, output / COPIES):
        for trash in folder.glob(f".*{_TRASH}"):
            shutil.rmtree(trash)
    if not step:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(actor)
    elif (actor / "latest").read_text() != f"{_TAG}{step}":
        rundir.write_atomic(actor / "latest", f"{_TAG}{step}")
    later = [actor / f"{_TAG}{each}" for each in checkpoints(output) if each > step]
    later += [copy_folder(output, each) for each in copies(output) if each > step]
    later += [path for path in _new_copies(output) if _step(path) > step or not _is_whole(path)]
    for path in later:
        _delete(path)
    if later:
        (output / COPIES / BEST).unlink(missing_ok=True)  # it may name one of them; the next save says it anew


def take(config: RLConfig, rows: Sequence[collect.Row]) -> None:
    """Make Hugging Face copies that OpenRLHF has finished ours, and delete saves that no longer stay.

    Call it while OpenRLHF runs, whenever; `rows` are those of the steps so far.
    """
    output = config.output
    for path in _new_copies(output):
        if rows and _step(path) <= rows[-1]["step"] and _is_whole(path):
            write_copy(config, path, copy_folder(output, _step(path)), step=_step(path), rows=rows)
            _delete(path)
            rotate(config, rows)


def rotate(config: RLConfig, rows: Sequence[collect.Row]) -> None:
    """Say which copy is the best, and delete the saves that are neither that nor among the last."""
    output, steps = config.output, copies(config.output)
    chosen = best(steps, rows)
    if chosen:
        step, by, value = chosen
        rundir.write_json(output / COPIES / BEST, {"step": step, "by": by, "value": value})
    for each in steps[: -config.keep_last_saves]:
        if not chosen or each != chosen[0]:
            _delete(copy_folder(output, each))
    whole = [each for each in checkpoints(output) if each <= last(output)]
    for each in whole[: -config.keep_last_saves]:
        _delete(_actor(output) / f"{_TAG}{each}")


def write_copy(config: RLConfig, source: Path, folder: Path, *, step: int, rows: Sequence[collect.Row]) -> None:
    """OpenRLHF's Hugging Face folder of a step -> one with what it leaves out, its lineage and DONE."""
    samples = config.prompts_per_step * config.samples_per_prompt
    tokens = sum(row.get("rl/response_length_mean", 0.0) for row in rows if row["step"] <= step) * samples
    with rundir.new_folder(folder) as new:
        for path in sorted(source.iterdir()):
            shutil.copy2(path, new / path.name)
        for name in COPIED_FILES:
            if (config.model / name).is_file():
                shutil.copy2(config.model / name, new / name)
        lineage.copy_licence(config.model, new)
        link = Lineage(
            name=config.name,
            kind="rl",
            weights_sha256=rundir.sha256_folder(new, "*.safetensors"),
            step=step,
            tokens=round(tokens),
            parent=lineage.read_if_present(config.model),
        )
        lineage.write(new, link)


def best(steps: Sequence[int], rows: Sequence[collect.Row]) -> tuple[int, str, float] | None:
    """Which of these saves is the best, by what, and how good: by validation if any was validated, else by reward."""
    kept = [row for row in rows if row["step"] in steps]
    validated = [(value, int(row["step"])) for row in kept if (value := collect.validation(row)) is not None]
    rewarded = [(row["rl/reward_mean"], int(row["step"])) for row in kept if "rl/reward_mean" in row]
    scored, by = (validated, "validation") if validated else (rewarded, "reward")
    if not scored:
        return None
    value, step = max(scored)
    return step, by, value


def _new_copies(output: Path) -> list[Path]:
    return sorted((output / CHECKPOINTS).glob(f"{_TAG}*{_COPY}"), key=_step)


def _is_whole(copy: Path) -> bool:
    """Whether OpenRLHF has finished a Hugging Face folder: it writes tokenizer.json last, after the weights."""
    try:
        json.loads((copy / "tokenizer.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _delete(path: Path) -> None:
    """Delete a folder so that a kill leaves no part of it under its name.

    A checkpoint leaves `_actor` at once: OpenRLHF looks at each file in there when it saves, and one that vanishes
    meanwhile is an error.
    """
    folder = path.parent.parent if path.parent.name == _ACTOR else path.parent
    trash = folder / f".{path.name}{_TRASH}"
    path.replace(trash)
    shutil.rmtree(trash)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_TAG).removesuffix(_COPY))


def _actor(output: Path) -> Path:
    return output / CHECKPOINTS / _ACTOR
