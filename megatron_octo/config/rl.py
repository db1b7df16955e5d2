"""R1-Zero style reinforcement learning of one branch with OpenRLHF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_octo.config.base import Settings, require, require_name, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class LongerResponses(Settings):
    """A step of a length schedule."""

    after_step: int
    """Rollout steps done before; a multiple of `save_every_steps`. (The paper counts updates, two a rollout step.)"""
    max_response_tokens: int
    """Longest response from then on, tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthStage:
    """A stretch of steps with one longest response: one run of OpenRLHF, which has no schedule of its own."""

    end: int
    """Its last step."""
    max_response_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RLConfig(Settings):
    """GRPO on verifiable problems. Defaults are the paper's (section 2.1) unless a field says otherwise."""

    name: str
    """The run's name, `llama32-3b-decay-long-rl`, say."""
    model: Path
    """The Hugging Face folder to start from."""
    prompts: Path
    """Problems and answers: JSON lines, a JSON array or Parquet; a pattern names several files."""
    question_column: str = "input"
    """Where a record has its problem; a dot leads into a record, as in `extra.question`."""
    answer_column: str = "label"
    r"""Where it has its answer: a number or a text. Of a text, what follows `####` or is in the last `\boxed{}`."""
    template: Literal["none", "simple", "user_assistant", "complex"] = "none"
    """What is put around a problem, as in the paper; `none` if the file has it already."""
    decontaminate_against: tuple[Path, ...] = ()
    """Evaluation sets: problems that share 13 words in a row with one of theirs are left out, and listed."""
    output: Path
    """The folder to write: checkpoints, metrics.jsonl, hf/, DONE."""
    num_steps: int
    """Rollout steps; each is `updates_per_step` optimizer updates."""
    prompts_per_step: int = 128
    """Prompts in a rollout step."""
    samples_per_prompt: int = 16
    """Responses to each prompt; their rewards are compared with each other."""
    updates_per_step: int = 2
    """Optimizer updates on one step's samples (the paper: 128 prompts / mini-batch 64)."""
    learning_rate: float = 1e-6
    """Constant, no warm-up."""
    clip_low: float = 0.2
    """Lower PPO clip range."""
    clip_high: float = 0.2
    """Upper PPO clip range."""
    kl_coefficient: float = 0.0
    """Weight of the KL penalty; 0 runs without a reference model."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""
    max_prompt_tokens: int = 400
    """Longer prompts are left out, and counted (OpenRLHF would cut them from the left)."""
    max_response_tokens: int = 4096
    """Longest response, tokens; the first stage's, if there is a schedule."""
    longer_responses: tuple[LongerResponses, ...] = ()
    """The length schedule: the paper's for long chains of thought is 2,048 tokens, 4,096 after 100 steps, 8,192 after
    160."""
    max_tokens_per_gpu: int = 16_384
    """Tokens in one packed training pass of a rank; attention over a pack costs its square on a CPU."""
    zero_stage: int = 3
    """DeepSpeed ZeRO stage: 2 shares optimizer and gradients, 3 the weights too."""
    num_gpus: int = 8
    """Devices of one node that share rollouts and training. A CPU counts one logical device."""
    save_every_steps: int = 20
    """Rollout steps between checkpoints."""
    seed: int = 42
    """Orders prompts and draws samples."""

    def __post_init__(self) -> None:
        require_name(self.name)
        counts = (
            "num_steps",
            "prompts_per_step",
            "samples_per_prompt",
            "updates_per_step",
            "save_every_steps",
            "num_gpus",
        )
        lengths = ("max_prompt_tokens", "max_response_tokens", "max_tokens_per_gpu")
        require_positive(self, "", *counts, *lengths)
        samples = self.prompts_per_step * self.samples_per_prompt
        require(
            samples % self.updates_per_step == 0,
            f"prompts_per_step {self.prompts_per_step} x samples_per_prompt {self.samples_per_prompt} = {samples} "
            f"samples do not divide by updates_per_step {self.updates_per_step}",
            fix="choose updates_per_step among the divisors",
        )
        self._check_schedule()

    def _check_schedule(self) -> None:
        before = 0
        for stage in self.longer_responses:
            require_positive(stage, "longer_responses.", "max_response_tokens")
            require(
                before < stage.after_step < self.num_steps and stage.after_step % self.save_every_steps == 0,
                f"longer_responses.after_step {stage.after_step} is not between {before} and num_steps "
                f"{self.num_steps}, or no multiple of save_every_steps {self.save_every_steps}: a stage goes on from "
                "the save at its border",
                fix="write the borders in rollout steps, ascending, and have save_every_steps divide them",
            )
            before = stage.after_step

    @property
    def stages(self) -> tuple[LengthStage, ...]:
        """The stretches of the length schedule, in order; one if there is none."""
        ends = [*(stage.after_step for stage in self.longer_responses), self.num_steps]
        lengths = [self.max_response_tokens, *(stage.max_response_tokens for stage in self.longer_responses)]
        return tuple(LengthStage(end=end, max_response_tokens=n) for end, n in zip(ends, lengths, strict=True))
