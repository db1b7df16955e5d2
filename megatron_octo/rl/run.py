"""One or more RL runs: check, run OpenRLHF, watch each step, and leave a Hugging Face folder.

OpenRLHF runs as a process of its own (`rl/cluster.py`); nothing of it is imported here. A run that
was killed goes on from its last checkpoint, with the prompts that it had not used yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from megatron_octo import console, lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.rl import LengthStage, RLConfig
from megatron_octo.data.tokenizer import check_vocabulary
from megatron_octo.errors import BadInput, OctoError, VerificationError
from megatron_octo.lineage import Lineage
from megatron_octo.rl import collect, prompts
from megatron_octo.rl.cluster import Cluster, RunFailed, cluster, meaningful, require_linux
from megatron_octo.rl.command import CHECKPOINTS, FINAL, PROMPTS, TENSORBOARD, check_command, command

LOG = "log/openrlhf.log"
HF = "hf"
LARGEST_VLLM_KL = 1e-3
"""Beyond it vLLM samples from other weights than those trained; with equal ones it is near 1e-4 in bf16."""
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
COPIED_FILES = ("generation_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")

log = console.logger(__name__)


def run_rl(config: RLConfig) -> Path:
    """Run one stage of RL to its end; returns its Hugging Face folder. See `run_all`."""
    return run_all([config])[0]


def run_all(configs: Sequence[RLConfig]) -> list[Path]:
    """Run stages of RL one after the other on one Ray cluster; returns their Hugging Face folders.

    Those that are DONE are skipped; all the others are checked before the first starts.

    Raises:
        BadInput: a model, a prompt file or a setting is wrong. Nothing is written then.
        VerificationError: vLLM and the trainer disagreed, or metrics or weights are missing.
        OctoError: OpenRLHF failed; the message has the end of its log.
    """
    pending = [config for config in configs if not _skip(config)]
    if pending:
        require_linux()
        cuda = has_gpu()
        plans = [check(config, cuda=cuda) for config in pending]
        num_gpus, work = max(config.num_gpus for config in pending), deque(zip(pending, plans, strict=True))
        while work:  # a run that ends at a border of its length schedule leaves no cluster to go on with
            with cluster(num_gpus=num_gpus, cuda=cuda) as engine:
                while work and _run(work[0][0], *work[0][1], engine, cuda=cuda):
                    work.popleft()
    return [config.output / HF for config in configs]


def has_gpu() -> bool:
    """Whether the driver of NVIDIA shows a GPU. Asked without torch, which would stay in memory during the run."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _skip(config: RLConfig) -> bool:
    rundir.check_free(config.output)
    rundir.check_config(
        config.output, to_dict(config), fix="give this run another --output, or the settings of the folder"
    )
    if rundir.is_done(config.output):
        log.info("%s: RL is done, skipped", config.output)
        return True
    return False


def check(config: RLConfig, *, cuda: bool) -> tuple[prompts.PromptPlan, prompts.PromptReport]:
    """Check all that a run needs, and choose its prompts. Changes nothing.

    Raises:
        BadInput: something is missing or wrong.
    """
    check_model(config, cuda=cuda)
    plan, report = prompts.choose_prompts(config)
    check_command(command(config, stage=config.stages[-1], num_episodes=plan.num_episodes, cuda=cuda))
    return plan, report


def check_model(config: RLConfig, *, cuda: bool) -> None:
    """Refuse a model folder that OpenRLHF or vLLM could not use.

    Raises:
        BadInput: a file is missing, the end-of-text token is, or the model's heads or positions do not fit.
    """
    missing = [name for name in MODEL_FILES if not (config.model / name).is_file()]
    if not any(config.model.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise BadInput(
            f"model folder {config.model} lacks {', '.join(missing)}",
            fix="give a whole Hugging Face folder; `octo convert to-hf` writes one",
        )
    if rundir.read_json(config.model / "generation_config.json").get("eos_token_id") is None:
        raise BadInput(
            f"{config.model}/generation_config.json has no eos_token_id: no response would ever end",
            fix="write the tokenizer's end-of-text id into it",
        )
    check_vocabulary(config.model)
    model = rundir.read_json(config.model / "config.json")
    head = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    if not cuda and head not in CPU_HEAD_SIZES:
        raise BadInput(
            f"attention heads of {head} in {config.model}: vLLM on a CPU takes {', '.join(map(str, CPU_HEAD_SIZES))}",
            fix="use a model with one of these head sizes, or a GPU",
        )
    positions = model.get("max_position_embeddings", 0)
    longest = max(stage.max_response_tokens for stage in config.stages)
    needed = config.max_prompt_tokens + longest
    if needed > positions:
        raise BadInput(
            f"max_prompt_tokens {config.max_prompt_tokens} + max_response_tokens {longest} "
            f"= {needed} is beyond the model's {positions} positions",
            fix="lower one of them",
        )


def _run(
    config: RLConfig, plan: prompts.PromptPlan, report: prompts.PromptReport, engine: Cluster, *, cuda: bool
) -> bool:
    """Go on with a run to its end, or to the next border of its length schedule; returns whether that is its end."""
    output = config.output
    with rundir.lock(output):
        rundir.claim(output, to_dict(config))
        began = time.monotonic()
        prompts.write_prompts(output / PROMPTS, plan)
        rundir.write_json(output / prompts.REPORT, asdict(report))
        log.info("%s: %s", config.name, report.describe(config))
        done = _resume_from(output / CHECKPOINTS)
        stage = next((each for each in config.stages if each.end > done), config.stages[-1])
        if done:
            log.info("%s: goes on after step %d of %d", config.name, done, config.num_steps)
        (output / "log").mkdir(exist_ok=True)
        with (output / LOG).open("a") as file:
            watch = Watch.after(config, done, file, cuda=cuda)
            log.info(
                "%s: OpenRLHF starts, responses of up to %s tokens; log: %s",
                config.name,
                f"{stage.max_response_tokens:,}",
                output / LOG,
            )
            arguments = command(config, stage=stage, num_episodes=plan.num_episodes, cuda=cuda)
            try:
                ended = engine.run(arguments, watch.line, lambda: _is_at_border(config, stage))
            except RunFailed as failure:
                raise _failure(config, watch, failure) from None
        if not ended:
            log.info("%s: step %d is saved, and longer responses begin", config.name, stage.end)
            return False
        rows = collect.read_metrics(output / collect.METRICS)
        if len(rows) < config.num_steps:
            rows = collect.fill_gaps(rows, collect.read_events(output / TENSORBOARD), config.num_steps)
            collect.write_metrics(output / collect.METRICS, rows)
        if len(rows) != config.num_steps:
            raise VerificationError(
                f"{config.name}: OpenRLHF reported {len(rows)} steps instead of {config.num_steps}",
                fix=f"see {output / LOG}",
            )
        _finish(config, rows)
        log.info("%s: done in %s; %s", config.name, console.duration(time.monotonic() - began), output / HF)
        return True


@dataclass(slots=True)
class Watch:
    """Reads OpenRLHF's lines as they come: log file, metrics, a console line a step, the check of the weights."""

    config: RLConfig
    file: TextIO
    cuda: bool
    time_before_s: float
    """What earlier attempts took."""
    began: float = field(default_factory=time.monotonic)
    recent: list[str] = field(default_factory=list)
    """Lines since the last step: where the reason of a failure is."""

    @classmethod
    def after(cls, config: RLConfig, done: int, file: TextIO, *, cuda: bool) -> Watch:
        """Go on after `done` steps: later rows of metrics.jsonl are of steps that will be done again."""
        path = config.output / collect.METRICS
        rows = collect.read_metrics(path)
        before = max((row["time_s"] for row in rows), default=0.0)
        collect.write_metrics(path, [row for row in rows if row["step"] <= done])
        return cls(config, file, cuda, before)

    def line(self, text: str) -> None:
        """Take one line.

        Raises:
            VerificationError: it reports a step whose samples came from other weights than those trained.
        """
        self.file.write(text + "\n")
        self.file.flush()
        self.recent.append(text)
        row = collect.parse_step(text)
        if row is not None:
            self.recent.clear()
            row["time_s"] = round(self.time_before_s + time.monotonic() - self.began, 3)
            collect.append_metrics(self.config.output / collect.METRICS, row)
            log.info("%s", step_line(row, self.config.num_steps))
            self._check(row)

    def _check(self, row: collect.Row) -> None:
        if row.get("rl/reward_error_share", 0.0) > 0:
            log.warning("step %d: %.1f%% of the rewards failed", row["step"], 100 * row["rl/reward_error_share"])
        kl = row.get("rl/vllm_kl")
        if kl is not None and abs(kl) < LARGEST_VLLM_KL:
            return
        what = (
            f"{self.config.name}, step {row['step']}: vllm_kl is {kl}, not within {LARGEST_VLLM_KL:g}: vLLM's "
            "log-probabilities differ from the trainer's"
        )
        if self.cuda:  # other kernels, and bf16
            log.warning("%s", what)
            return
        raise VerificationError(
            f"{what}, as they do when it samples from old weights",
            fix=f"see {self.config.output / LOG}; check the versions of openrlhf and vllm against the lock",
        )


def step_line(row: collect.Row, num_steps: int) -> str:
    """A step for the console."""
    parts = [f"step {int(row['step'])}/{num_steps}"]
    for name, label, form in (
        ("rl/reward_mean", "reward", "{:+.3f}"),
        ("rl/accuracy", "right", "{:.1%}"),
        ("rl/response_length_mean", "length", "{:.1f}"),
        ("rl/truncated_share", "cut off", "{:.1%}"),
        ("rl/vllm_kl", "vllm_kl", "{:.1e}"),
        ("optim/grad_norm", "grad", "{:.2f}"),
        ("rl/step_s", "", "{:.1f}s"),
    ):
        if name in row:
            parts.append(f"{label} {form.format(row[name])}".strip())
    return "  ".join(parts)


def _resume_from(folder: Path) -> int:
    """The step of the last whole checkpoint, 0 for none. Removes torn ones, at which OpenRLHF would stumble.

    DeepSpeed writes the file `latest` after all others; a folder that it does not name is either
    older, and not needed, or was being written when the run was killed.
    """
    actor = folder / "_actor"
    step = _latest_step(actor)
    if not step:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(actor)
    for other in _checkpoints(actor):
        if other.name != f"global_step{step}":
            shutil.rmtree(other)
    return step


def _is_at_border(config: RLConfig, stage: LengthStage) -> bool:
    """Whether the checkpoint at the end of a stage is there, and another stage follows.

    Raises:
        VerificationError: a later one is there already: it was trained with the responses of the stage before.
    """
    if stage.end == config.num_steps:
        return False
    saved = _latest_step(config.output / CHECKPOINTS / "_actor")
    if saved > stage.end:
        raise VerificationError(
            f"{config.name}: step {saved} was saved before the run could be stopped at step {stage.end}",
            fix="save less often (save_every_steps), or put the border elsewhere; begin anew in another folder",
        )
    return saved == stage.end


def _latest_step(actor: Path) -> int:
    """The step of the last whole checkpoint, 0 for none. DeepSpeed writes `latest` after all else."""
    latest = actor / "latest"
    tag = latest.read_text().strip() if latest.exists() else ""
    return int(tag.removeprefix("global_step")) if tag and (actor / tag).is_dir() else 0


def _checkpoints(actor: Path) -> Iterator[Path]:
    return (path for path in actor.glob("global_step*") if path.is_dir())


def _failure(config: RLConfig, watch: Watch, failure: RunFailed) -> OctoError:
    end = "\n".join(f"    {line}" for line in meaningful(watch.recent))
    return OctoError(
        f"{config.name}: OpenRLHF failed: {failure}\n{end}",
        fix=f"the whole log is {config.output / LOG}; run it again to go on from the last checkpoint",
    )


def _finish(config: RLConfig, rows: Sequence[collect.Row]) -> None:
    """OpenRLHF's final folder -> hf/, with what it leaves out; then DONE."""
    output, final = config.output, config.output / FINAL
    if not any(final.glob("*.safetensors")):
        raise VerificationError(f"{config.name}: OpenRLHF left no weights in {final}", fix=f"see {output / LOG}")
    with rundir.new_folder(output / HF) as folder:
        for path in sorted(final.iterdir()):
            shutil.copy2(path, folder / path.name)
        for name in COPIED_FILES:
            if (config.model / name).is_file():
                shutil.copy2(config.model / name, folder / name)
        samples = config.prompts_per_step * config.samples_per_prompt
        lineage.write(
            folder,
            Lineage(
                name=config.name,
                kind="rl",
                weights_sha256=rundir.sha256_folder(folder, "*.safetensors"),
                step=config.num_steps,
                tokens=round(sum(row.get("rl/response_length_mean", 0.0) for row in rows) * samples),
                parent=lineage.read_if_present(config.model),
            ),
        )
    shutil.rmtree(final)
    rundir.mark_done(output)
