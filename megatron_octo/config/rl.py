"""R1-Zero style reinforcement learning of one branch with OpenRLHF."""

from __future__ import annotations

import math
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


RLAction = Literal["log", "roll_back", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RLWatchConfig(Settings):
    """What to do when a run goes wrong.

    log: say it. roll_back: go on from the last save from before the trouble, with the same prompts and other samples.
    stop: end with an error; the saves stay.
    """

    on_non_finite: RLAction = "stop"
    """At a reward, loss, gradient norm or vllm_kl that is infinite or not a number."""
    on_stale_weights: RLAction = "stop"
    """At a vllm_kl beyond `most_vllm_kl`, or on its way there: rollouts come from other weights than those trained."""
    on_collapse: RLAction = "stop"
    """At a score that has fallen while responses are cut off."""
    on_repetition: RLAction = "stop"
    """At responses that have begun to repeat themselves."""
    on_reward_errors: RLAction = "stop"
    """At a grading that breaks on most responses: they count as wrong, and the run learns what breaks it."""
    window_steps: int = 5
    """Collapse, repetition and a rise of vllm_kl compare the mean of so many last steps with the best mean of as many
    before; the grading breaks in each of so many."""
    score_fall: float = 0.5
    """Collapse: so much of the best share of right answers is lost, and"""
    truncated_share: float = 0.5
    """so many responses are cut off."""
    repetition_rise: float = 0.5
    """Repetition: so much above its lowest share."""
    reward_error_share: float = 0.5
    """Reward errors: more than this share of the responses, in each of `window_steps` steps. A few are no finding."""
    most_vllm_kl: float | None = None
    """Largest |vllm_kl|; None: 1e-3 on a CPU, where equal weights give 1e-4, and 0.02 on a GPU, whose kernels differ
    more. Nobody has run this on a GPU yet."""
    vllm_kl_rise: float = 10.0
    """A rise of |vllm_kl|: so many times its lowest, and at least half of `most_vllm_kl`."""
    most_roll_backs: int = 2
    """Stop at the next."""

    def __post_init__(self) -> None:
        require_positive(self, "watch.", "window_steps")
        if self.most_vllm_kl is not None:
            require_positive(self, "watch.", "most_vllm_kl")
        for name in ("score_fall", "truncated_share", "repetition_rise", "reward_error_share"):
            value = getattr(self, name)
            require(0 < value <= 1, f"watch.{name} {value:g} is not in (0, 1]", fix="it is a share: 0.5, say")
        require(
            self.vllm_kl_rise > 1,
            f"watch.vllm_kl_rise {self.vllm_kl_rise:g} is not above 1",
            fix="it is a factor: 10, say",
        )
        require(
            self.most_roll_backs >= 0,
            f"watch.most_roll_backs {self.most_roll_backs} is below 0",
            fix="give 0 to stop at the first, or more",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTerms(Settings):
    """What is added to +1 for a right answer and -1 for any other; the paper adds nothing."""

    format: float = 0.0
    r"""Added where the response has an answer in `\boxed{}`, taken off where it has none."""
    repetition: float = 0.0
    """Taken off times the share of the response's n-grams that occurred in it before."""
    repetition_ngram: int = 20
    """Words and signs in an n-gram."""

    def __post_init__(self) -> None:
        require_positive(self, "reward.", "repetition_ngram")
        for name in ("format", "repetition"):
            value = getattr(self, name)
            require(value >= 0, f"reward.{name} {value} is below 0", fix="give 0, which leaves the term out, or more")


SET_AS_TEXT = "[NAME=]FILE[:QUESTION_COLUMN:ANSWER_COLUMN]"


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSet(Settings):
    """Problems that are never trained on."""

    name: str
    """Names its metrics: `valid/NAME/accuracy`."""
    prompts: Path
    """As `RLConfig.prompts`; they get the same template."""
    question_column: str = "input"
    """Where a record has its problem."""
    answer_column: str = "label"
    """Where it has its answer."""

    def __post_init__(self) -> None:
        require_name(self.name)

    @classmethod
    def of(cls, text: str) -> ValidationSet:
        """The set that a command line writes as SET_AS_TEXT; the name is the file's, up to a dot, unless it is given.

        Raises:
            SettingsError: it is written otherwise.
        """
        name, equals, rest = text.partition("=")
        if not equals or "/" in name:  # the path has it
            name, rest = "", text
        path, *columns = rest.split(":")
        require(
            bool(path) and len(columns) in (0, 2) and all(columns),
            f"validation set {text!r} is not {SET_AS_TEXT}",
            fix="write MATH500=runs/prompts/math500.jsonl:problem:answer, say",
        )
        named = dict(zip(("question_column", "answer_column"), columns, strict=False))
        return cls(name=name or Path(path).name.partition(".")[0], prompts=Path(path), **named)

    def __str__(self) -> str:
        """As `of` reads it."""
        return f"{self.name}={self.prompts}:{self.question_column}:{self.answer_column}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig(Settings):
    """What the policy is asked now and then while it trains. Defaults are the paper's; the length is ours."""

    sets: tuple[ValidationSet, ...] = ()
    """Empty: no validation. On the command line they replace the recipe's: MATH500=math500.jsonl:problem:answer."""
    every_steps: int = 4
    """Rollout steps between validations."""
    samples_per_prompt: int = 1
    """Responses to each problem; the accuracy is their mean."""
    temperature: float = 0.0
    """0 is greedy, with one sample."""
    max_prompt_tokens: int = 1024
    """Longer problems are left out, and counted."""
    max_response_tokens: int = 4096
    """Longest response, tokens, at every step: under a length schedule scores must not jump at its borders."""

    def __post_init__(self) -> None:
        counts = ("every_steps", "samples_per_prompt", "max_prompt_tokens", "max_response_tokens")
        require_positive(self, "validation.", *counts)
        require(
            self.temperature > 0 or self.samples_per_prompt == 1,
            f"validation.samples_per_prompt {self.samples_per_prompt} at temperature 0 would be the same response "
            "again and again",
            fix="raise validation.temperature or ask for one sample",
        )
        require(
            0 <= self.temperature < math.inf,
            f"validation.temperature {self.temperature:g} is no number from 0 on",
            fix="give 0, which is greedy, or more",
        )
        names = [each.name for each in self.sets]
        require(
            len(set(names)) == len(names),
            f"validation.sets are called {', '.join(names)}",
            fix="give each a name of its own",
        )


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
    stop: tuple[str, ...] = ("User:", "Assistant:", "Question:", "Answer:")
    """A response ends after the first of these, which stays in it: a base model would write the next problem itself."""
    reward: RewardTerms = RewardTerms()
    """What else than the right answer is worth something."""
    validation: ValidationConfig = ValidationConfig()
    """Problems asked while it trains."""
    precision: Literal["bf16", "fp16"] = "bf16"
    """Format of weights and activations, in training and in vLLM; the optimizer's copy is fp32. fp16 has eight times
    bf16's resolution, which brings vLLM's log-probabilities closer to the trainer's, and needs a GPU."""
    max_prompt_tokens: int = 400
    """Longer prompts are left out, and counted (OpenRLHF would cut them from the left)."""
    max_response_tokens: int = 4096
    """Longest response, tokens; the first stage's, if there is a schedule."""
    longer_responses: tuple[LongerResponses, ...] = ()
    """The length schedule: the paper's for long chains of thought is 2,048 tokens, 4,096 after 100 steps, 8,192 after
    160."""
    max_tokens_per_gpu: int = 16_384
    """Tokens in one packed training pass of a rank, the longest sample at least; attention over a pack costs its square
    on a CPU."""
    zero_stage: int = 3
    """DeepSpeed ZeRO stage, 1 to 3: 1 shares the optimizer, 2 the gradients too, 3 the weights too."""
    num_nodes: int = 1
    """Nodes that share rollouts and training; above 1 they are a Slurm job's, or a Ray cluster's that is there."""
    num_gpus: int = 8
    """Devices of each node. A CPU counts one logical device."""
    save_every_steps: int = 20
    """Rollout steps between saves: a checkpoint to go on from, and a Hugging Face copy."""
    keep_last_saves: int = 2
    """Saves to keep; the best Hugging Face copy stays besides."""
    watch: RLWatchConfig = RLWatchConfig()
    """What to do when the run goes wrong."""
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
            "keep_last_saves",
            "num_nodes",
            "num_gpus",
        )
        lengths = ("max_prompt_tokens", "max_response_tokens", "max_tokens_per_gpu")
        require_positive(self, "", *counts, *lengths)
        for name in ("learning_rate", "temperature", "clip_low", "clip_high"):
            value = getattr(self, name)
            require(
                0 < value < math.inf, f"{name} {value:g} is no number above 0", fix="give the paper's: leave it out"
            )
        for name in ("kl_coefficient", "seed"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} {value:g} is no number from 0 on", fix="give 0 or more")
        samples = self.prompts_per_step * self.samples_per_prompt
        require(
            samples % self.updates_per_step == 0,
            f"prompts_per_step {self.prompts_per_step} x samples_per_prompt {self.samples_per_prompt} = {samples} "
            f"samples do not divide by updates_per_step {self.updates_per_step}",
            fix="choose updates_per_step among the divisors",
        )
        require(
            samples // self.updates_per_step % self.num_devices == 0,
            f"the {samples // self.updates_per_step} samples of an update do not divide by "
            f"num_nodes {self.num_nodes} x num_gpus {self.num_gpus} = {self.num_devices} devices: OpenRLHF would leave "
            "the rest out",
            fix="choose other numbers of nodes, devices or updates_per_step",
        )
        require(
            self.zero_stage in (1, 2, 3),
            f"zero_stage {self.zero_stage} is none of 1, 2 and 3: at 0 DeepSpeed has no optimizer whose state "
            "leaves the GPU while vLLM generates",
            fix="give 3, or 2 where the weights fit each GPU",
        )
        require(all(self.stop), f"stop {self.stop} has an empty text", fix="leave it out: every response has it")
        require(
            not self.validation.sets or self.validation.every_steps <= self.num_steps,
            f"validation.every_steps {self.validation.every_steps} is beyond num_steps {self.num_steps}",
            fix="validate more often, or name no validation.sets",
        )
        self._check_schedule()
        self._check_roll_backs()

    def _check_schedule(self) -> None:
        before, shorter = 0, self.max_response_tokens
        for stage in self.longer_responses:
            require_positive(stage, "longer_responses.", "max_response_tokens")
            require(
                before < stage.after_step < self.num_steps and stage.after_step % self.save_every_steps == 0,
                f"longer_responses.after_step {stage.after_step} is not between {before} and num_steps "
                f"{self.num_steps}, or no multiple of save_every_steps {self.save_every_steps}: a stage goes on from "
                "the save at its border",
                fix="write the borders in rollout steps, ascending, and have save_every_steps divide them",
            )
            require(
                stage.max_response_tokens >= shorter,
                f"longer_responses.max_response_tokens {stage.max_response_tokens} after step {stage.after_step} is "
                f"below {shorter}, the longest response before",
                fix="write the lengths ascending; max_response_tokens is the first stage's",
            )
            before, shorter = stage.after_step, stage.max_response_tokens
        longest = self.max_prompt_tokens + shorter
        require(
            longest <= self.max_tokens_per_gpu,
            f"a prompt and its response may have {longest} tokens, and a pass has max_tokens_per_gpu "
            f"{self.max_tokens_per_gpu}: OpenRLHF would pass it all the same, in a pack of its own",
            fix="raise max_tokens_per_gpu, or lower max_prompt_tokens or max_response_tokens",
        )

    def _check_roll_backs(self) -> None:
        kept, window = self.save_every_steps * (self.keep_last_saves - 1), self.watch.window_steps
        require(
            "roll_back" not in (self.watch.on_collapse, self.watch.on_repetition, self.watch.on_reward_errors)
            or kept >= window,
            f"watch rolls back to before a window of {window} steps, and the last {self.keep_last_saves} saves, every "
            f"{self.save_every_steps} steps, may all be from within it",
            fix="raise keep_last_saves or save_every_steps, or lower watch.window_steps",
        )

    @property
    def num_devices(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.num_gpus

    @property
    def stages(self) -> tuple[LengthStage, ...]:
        """The stretches of the length schedule, in order; one if there is none."""
        ends = [*(stage.after_step for stage in self.longer_responses), self.num_steps]
        lengths = [self.max_response_tokens, *(stage.max_response_tokens for stage in self.longer_responses)]
        return tuple(LengthStage(end=end, max_response_tokens=n) for end, n in zip(ends, lengths, strict=True))

    def sequence_tokens(self, stage: LengthStage) -> int:
        """Room for the longest prompt and response of a stage, validation's too."""
        asked = self.validation
        rollout = self.max_prompt_tokens + stage.max_response_tokens
        return max(rollout, asked.max_prompt_tokens + asked.max_response_tokens) if asked.sets else rollout

    def validates_at(self, step: int) -> bool:
        """Whether validation follows a step."""
        return bool(self.validation.sets) and step % self.validation.every_steps == 0
