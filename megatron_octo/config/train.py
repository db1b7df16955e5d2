"""One mid-training stage, whole: `MidTrainConfig` is what a recipe function returns and what a run folder keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_octo.config.base import Settings, require, require_name, require_positive
from megatron_octo.config.data import MixtureConfig
from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.config.fits import check_fit, check_shards
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.schedule import RateConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FromImport(Settings):
    """Start from weights that `octo convert from-hf` wrote; the optimizer starts fresh."""

    kind: Literal["import"] = "import"
    path: Path
    """The converted folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FromRun(Settings):
    """Start from a save of another run: how a decay branch leaves the stable stage."""

    kind: Literal["run"] = "run"
    run: str
    """The parent run's name."""
    step: int | None = None
    """The parent's save, by its step; None for its newest good one."""
    tokens: int | None = None
    """The same, by the tokens that the parent had read then."""
    optimizer: bool = True
    """Carry over the optimizer's moments, and in the parent's layout the random states too; False: weights alone.
    The paper does not state it; it is natural, since the rate is continuous."""
    skip_consumed: bool = False
    """Of data sets that the parent reads too, read the sequences that come after those it read; False: all of them."""
    rate_jump: bool = False
    """Let the learning rate begin at another value than the parent's at that save."""

    def __post_init__(self) -> None:
        require(
            self.step is None or self.tokens is None,
            f"start.step {self.step} and start.tokens {self.tokens} both name the parent's save",
            fix="give one of them",
        )

    @property
    def names_save(self) -> bool:
        """Whether it is to be this save of the parent and no other; else it is the newest good one."""
        return self.step is not None or self.tokens is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class FromScratch(Settings):
    """Start from random weights drawn from `seed`."""

    kind: Literal["scratch"] = "scratch"


StartConfig = FromImport | FromRun | FromScratch


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig(Settings):
    """How many tokens, in steps of how many."""

    train_tokens: int
    """Tokens of this stage; a whole number of steps."""
    batch_sequences: int
    """Sequences in one optimizer step, over all ranks (the paper: 512)."""
    micro_batch_sequences: int = 1
    """Sequences in one forward pass of one rank; lower it when memory runs out."""

    def __post_init__(self) -> None:
        require_positive(self, "budget.", "train_tokens", "batch_sequences", "micro_batch_sequences")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Settings):
    """AdamW."""

    beta1: float = 0.9
    """Decay of the first moment. Not in the paper."""
    beta2: float = 0.95
    """Decay of the second moment. Not in the paper."""
    eps: float = 1e-8
    """Added to the root of the second moment. Not in the paper."""
    weight_decay: float = 0.1
    """The paper's Tables 3 and 4; norms never decay."""
    weight_decay_over_tokens: RateConfig | None = None
    """A curve in place of that number, as learning_rate has one."""
    clip_norm: float = 1.0
    """Largest global gradient norm. Not in the paper."""

    def __post_init__(self) -> None:
        for name, usual in (("beta1", 0.9), ("beta2", 0.95)):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} {value:g} is not in [0, 1)", fix=f"a usual one is {usual}")
        for name, usual in (("eps", 1e-8), ("clip_norm", 1.0)):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name} {value:g} is not above 0", fix=f"a usual one is {usual:g}")
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay {self.weight_decay:g} is below 0: the weights would grow",
            fix="give 0 or more; the paper's is 0.1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig(Settings):
    """How the model is cut; what is left of the ranks is data parallel."""

    tensor: int = 1
    """Ranks that share each layer's matrices; divides the heads and KV heads."""
    sequence: bool = False
    """Also share the activations outside the matrices, along the sequence; needs tensor > 1."""
    pipeline: int = 1
    """Ranks that share the layers."""
    virtual_pipeline: int | None = None
    """Model chunks a pipeline rank holds (interleaved schedule); None for one."""
    context: int = 1
    """Ranks that share each sequence in attention; needs Transformer Engine."""
    distributed_optimizer: bool = True
    """Share the optimizer state among data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the next forward pass runs; needs the two options above."""
    fsdp: bool = False
    """Share weights and gradients too among data-parallel ranks: torch's FSDP, instead of the distributed optimizer."""

    def __post_init__(self) -> None:
        require_positive(self, "parallel.", "tensor", "pipeline", "context")
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence is on with parallel.tensor 1",
            fix="sequence parallelism shares work among tensor-parallel ranks: turn it off or raise parallel.tensor",
        )
        require(
            self.virtual_pipeline is None or self.pipeline > 1,
            f"parallel.virtual_pipeline {self.virtual_pipeline} with parallel.pipeline 1",
            fix="interleaving needs pipeline ranks: leave it out or raise parallel.pipeline",
        )
        require(
            not self.overlap_param_gather or (self.overlap_grad_reduce and self.distributed_optimizer),
            "parallel.overlap_param_gather without overlap_grad_reduce and distributed_optimizer",
            fix="turn both on, or this off",
        )

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig(Settings):
    """Number formats."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Format of weights and activations; the optimizer's copy is fp32 either way."""
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = "off"
    """Format of the matrix products: FP8 with Transformer Engine's scales. delayed: a scale a tensor, from the
    largest values of steps before; tensorwise: a scale a tensor, from its own; blockwise: a scale for each 128 x 128 of
    a weight and 1 x 128 of an activation (Hopper); mxfp8: a scale for each 32 values (Blackwell)."""
    fp8_weights: bool = False
    """Keep the weights themselves in FP8, so that they are gathered and stored in half the bytes."""
    bf16_first_layers: int = 0
    """Under fp8: leave so many first layers in bf16."""
    bf16_last_layers: int = 0
    """Under fp8: leave so many last layers in bf16."""
    fp8_emulation: bool = False
    """Under fp8: round as the recipe does and multiply in the ordinary format: its numerics without its chip, slow."""
    fp8_fallback: bool = False
    """Where the machine lacks what `fp8` needs: train in bf16 and say so, rather than refuse."""

    def __post_init__(self) -> None:
        require(
            self.fp8 == "off" or self.dtype == "bf16",
            f"precision.fp8 {self.fp8} with precision.dtype {self.dtype}",
            fix="set precision.dtype to bf16: FP8 takes its operands from bf16",
        )
        require(
            self.fp8 != "off" or not self.fp8_weights,
            "precision.fp8_weights with precision.fp8 off",
            fix="choose a recipe (precision.fp8), or turn precision.fp8_weights off",
        )
        for name in ("bf16_first_layers", "bf16_last_layers"):
            require(
                getattr(self, name) >= 0, f"precision.{name} {getattr(self, name)} is below 0", fix="give 0 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig(Settings):
    """What is computed twice to save memory, or recorded once to save time; the result is the same."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations to compute again in the backward pass: none; SwiGLU's, which is cheap and wide (attention keeps no
    scores to begin with); or all of a layer."""
    cuda_graphs: bool = False
    """Record each layer's kernels once and replay them; needs a GPU and Transformer Engine."""
    deterministic: bool = True
    """On a GPU, have Transformer Engine's attention sum gradients in one order, so that a resume repeats the losses to
    the bit; slower. NVTE_ALLOW_NONDETERMINISTIC_ALGO, where it is set, decides instead."""


ChatTemplate = Literal["plain", "own"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig(Settings):
    """When to save and what to keep. Several intervals may be given; the last step always saves."""

    every_steps: int | None = None
    """Steps between saves."""
    every_tokens: int | None = None
    """Tokens between saves: a save follows the step that reaches each multiple."""
    every_minutes: float | None = None
    """Minutes between saves, by rank 0's clock."""
    keep_last: int = 2
    """Saves to keep; the last step's save always stays."""
    keep_every_tokens: int | None = None
    """Keep for good, besides, the first save at or after each multiple of so many tokens: branches may start there."""
    chat_template: ChatTemplate = "plain"
    """Of the exports made from these saves: `plain` (`User:` and `Assistant:`), or `own`, the tokenizer's."""

    def __post_init__(self) -> None:
        intervals = ("every_steps", "every_tokens", "every_minutes")
        given = [name for name in (*intervals, "keep_every_tokens") if getattr(self, name) is not None]
        require_positive(self, "save.", "keep_last", *given)
        require(
            any(name in given for name in intervals),
            "save has no interval: all would be lost with the machine",
            fix=f"give one of {', '.join(f'save.{name}' for name in intervals)}",
        )


Action = Literal["log", "skip", "roll_back", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig(Settings):
    """What to do when a step looks wrong, when a rank is slow, and when nothing moves.

    log: say it. skip: leave the weights as they are and go on with the next batch. roll_back: go back to the last save
    and leave out the batches that led here. stop: end with an error. Before it acts, the step is computed once more.
    """

    on_non_finite: Literal["skip", "roll_back", "stop"] = "stop"
    """At a loss or gradient norm that is infinite or not a number."""
    on_loss_spike: Action = "log"
    """At a loss far above the last steps'."""
    on_grad_norm: Action = "log"
    """At a gradient norm far above the last steps'."""
    sigmas: float = 6.0
    """How far: standard deviations above the median of the last steps, both estimated from medians, so that spikes
    among them count little."""
    window_steps: int = 128
    """The last steps that a step is compared with; none is judged before there are so many."""
    most_skips_in_a_row: int = 8
    """Stop at the next."""
    leave_out_steps: int = 64
    """Batches that a roll back leaves out, the last one being the one at fault; none of before the save."""
    most_roll_backs: int = 3
    """Stop at the next."""
    straggler_ratio: float = 1.3
    """Name a rank that computes so many times longer than the median of the ranks that do the same work."""
    straggler_every_steps: int = 100
    """Steps between such comparisons."""
    hang_timeout_s: float | None = 540.0
    """End the job when no step, save or validation ends for so long, nor before them a part of the start (checksums
    and index, model and load), with every rank's stack in the run's log/. By default before NCCL gives up (10
    minutes), which says nothing. None: wait for ever."""

    def __post_init__(self) -> None:
        require_positive(
            self, "watch.", "sigmas", "window_steps", "leave_out_steps", "straggler_ratio", "straggler_every_steps"
        )
        require(
            self.hang_timeout_s is None or self.hang_timeout_s > 0,
            f"watch.hang_timeout_s {self.hang_timeout_s} is not above 0",
            fix="give seconds, or None to wait for ever",
        )
        for name in ("most_skips_in_a_row", "most_roll_backs"):
            most = getattr(self, name)
            require(most >= 0, f"watch.{name} {most} is below 0", fix="give 0 to stop at the first, or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateConfig(Settings):
    """Loss on documents that were held out (`validation_share` at preparation), source by source."""

    every_steps: int | None = None
    """Steps between validations; the last step always validates. None: never."""
    sequences: int = 512
    """Sequences of each source, always the same ones; fewer where a source holds out less."""

    def __post_init__(self) -> None:
        require_positive(self, "validate.", "sequences")
        if self.every_steps is not None:
            require_positive(self, "validate.", "every_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class MarksConfig(Settings):
    """Token marks at which the run is saved, and its save converted and evaluated by processes beside the training."""

    at_tokens: tuple[int, ...] = ()
    """Tokens of this stage; a mark is reached by the step that reads so many."""
    every_tokens: int | None = None
    """A mark at each multiple of this too."""
    evaluate: EvaluateConfig | None = None
    """What to ask each export, with `models` empty; scores go to the run's scores/STEP/TASK."""
    devices: str = ""
    """GPUs for the evaluation, as CUDA_VISIBLE_DEVICES names them: the training leaves no room on its own."""

    def __post_init__(self) -> None:
        for tokens in (*self.at_tokens, *(() if self.every_tokens is None else (self.every_tokens,))):
            require(tokens > 0, f"marks: {tokens} tokens is no mark", fix="give tokens above 0")
        require(
            self.evaluate is None or not self.evaluate.models,
            "marks.evaluate.models names models",
            fix="leave it empty: what is evaluated is the mark's own export",
        )

    def reached(self, before: int, after: int) -> bool:
        """Whether a mark lies above `before` and not above `after`, both tokens of the stage."""
        return any(before < mark <= after for mark in self.at_tokens) or (
            self.every_tokens is not None and before // self.every_tokens < after // self.every_tokens
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MidTrainConfig(Settings):
    """One stage of stable-then-decay mid-training."""

    name: str
    """Name of the run and of its folder under OCTO_RUNS."""
    model: ModelConfig
    """What is trained."""
    start: StartConfig
    """Where the weights come from."""
    data: MixtureConfig
    """What is read."""
    budget: BudgetConfig
    """How much of it."""
    learning_rate: RateConfig
    """Learning rate over tokens."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW's numbers."""
    parallel: ParallelConfig = ParallelConfig()
    """How the ranks share the work."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    compute: ComputeConfig = ComputeConfig()
    """Memory against time."""
    save: SaveConfig
    """Checkpoints."""
    watch: WatchConfig = WatchConfig()
    """Outliers, stragglers, hangs."""
    validate: ValidateConfig = ValidateConfig()
    """Loss on held-out documents."""
    marks: MarksConfig = MarksConfig()
    """Exports and scores on the way."""
    log_every_steps: int = 10
    """Steps between log lines; metrics.jsonl has every step."""
    wandb_project: str | None = None
    """Also send the numbers to this project of Weights & Biases; needs its package and WANDB_API_KEY."""
    seed: int = 1234
    """Draws random weights and dropout."""

    def __post_init__(self) -> None:
        require_name(self.name)
        require_positive(self, "", "log_every_steps")
        batch = self.batch_tokens
        steps, rest = divmod(self.budget.train_tokens, batch)
        near = sorted({max(1, steps) * batch, (steps + 1) * batch}, key=lambda t: abs(t - self.budget.train_tokens))
        require(
            rest == 0 and steps > 0,
            f"budget.train_tokens {self.budget.train_tokens:,} is not whole steps of {self.budget.batch_sequences:,} "
            f"sequences x {self.data.seq_length:,} tokens = {batch:,}",
            fix=f"the nearest budget that is: {near[0]:,} ({near[0] // batch:,} steps)",
        )
        for name, curve in (
            ("learning_rate", self.learning_rate),
            ("optimizer.weight_decay_over_tokens", self.optimizer.weight_decay_over_tokens),
        ):
            require(
                curve is None or curve.fewest_tokens <= self.budget.train_tokens,
                f"{name}: warm-up and decay take {curve.fewest_tokens if curve else 0:,} tokens, more than "
                f"budget.train_tokens {self.budget.train_tokens:,}",
                fix="shorten them, or raise the budget",
            )
        require(
            self.budget.batch_sequences % self.budget.micro_batch_sequences == 0,
            f"budget.batch_sequences {self.budget.batch_sequences} does not divide by "
            f"budget.micro_batch_sequences {self.budget.micro_batch_sequences}",
            fix="choose a divisor",
        )
        require(
            self.data.seq_length <= self.model.max_positions,
            f"data.seq_length {self.data.seq_length} is beyond model.max_positions {self.model.max_positions}",
            fix="shorten the sequence",
        )
        require(
            self.data.across_documents or self.parallel.context == 1,
            f"data.across_documents is off with parallel.context {self.parallel.context}: context parallelism shares "
            "out whole sequences, not the documents in them",
            fix="set parallel.context to 1, or leave data.across_documents on",
        )
        _check_layout(self.model, self.parallel)
        check_fit(self)

    @property
    def batch_tokens(self) -> int:
        """Tokens in one optimizer step."""
        return self.budget.batch_sequences * self.data.seq_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of this stage."""
        return self.budget.train_tokens // self.batch_tokens

    @property
    def asks_of_the_machine(self) -> bool:
        """Whether some setting works on some machines only; `model/build.py:check_platform` knows which."""
        return self.parallel.context > 1 or self.compute.cuda_graphs or self.precision.fp8 != "off"

    def resolve(self, world_size: int) -> TrainPlan:
        """Check what depends on the number of ranks and do the arithmetic.

        Raises:
            SettingsError: the ranks do not hold whole copies of the model, or the batch does not divide.
        """
        model_ranks = self.parallel.model_ranks
        require(
            world_size > 0 and world_size % model_ranks == 0,
            f"{world_size} ranks do not hold whole copies of the model: tensor {self.parallel.tensor} x pipeline "
            f"{self.parallel.pipeline} x context {self.parallel.context} = {model_ranks} ranks a copy",
            fix=f"start a multiple of {model_ranks} ranks (--ranks), or change the layout (--parallel.*)",
        )
        data_ranks = world_size // model_ranks
        rows = data_ranks * self.budget.micro_batch_sequences
        require(
            self.budget.batch_sequences % rows == 0,
            f"budget.batch_sequences {self.budget.batch_sequences} does not divide by {data_ranks} data-parallel "
            f"ranks x budget.micro_batch_sequences {self.budget.micro_batch_sequences} = {rows}",
            fix="change the number of ranks, the micro-batch or the layout",
        )
        if self.parallel.fsdp:
            check_shards(self, data_ranks * self.parallel.context)
        num_micro_batches = self.budget.batch_sequences // rows
        require(
            self.parallel.virtual_pipeline is None or num_micro_batches % self.parallel.pipeline == 0,
            f"{num_micro_batches} micro-batches a step do not divide by parallel.pipeline {self.parallel.pipeline}, "
            "which the interleaved schedule needs",
            fix="change the micro-batch, or leave parallel.virtual_pipeline out",
        )
        return TrainPlan(
            world_size=world_size,
            data_ranks=data_ranks,
            num_micro_batches=num_micro_batches,
            num_steps=self.num_steps,
            batch_tokens=self.batch_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout(Settings):
    """How a stage lies on GPUs of one kind, whatever their number: what a recipe file's `LAYOUTS` are made of."""

    parallel: ParallelConfig
    """How the model is cut."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    compute: ComputeConfig = ComputeConfig()
    """Memory against time."""
    micro_batch_sequences: int = 1
    """Sequences in one forward pass of one rank."""

    def of(self, config: MidTrainConfig) -> MidTrainConfig:
        """The stage, laid out so."""
        return replace(
            config,
            parallel=self.parallel,
            precision=self.precision,
            compute=self.compute,
            budget=replace(config.budget, micro_batch_sequences=self.micro_batch_sequences),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan(Settings):
    """What the settings mean on a given number of ranks."""

    world_size: int
    """Processes in the group."""
    data_ranks: int
    """Copies of the model."""
    num_micro_batches: int
    """Forward passes of a rank in one step."""
    num_steps: int
    """Optimizer steps."""
    batch_tokens: int
    """Tokens of one step."""

    def arithmetic(self, config: MidTrainConfig) -> str:
        """The plan as lines of arithmetic, for the log and plan.txt."""
        b, p, length = config.budget, config.parallel, config.data.seq_length
        return "\n".join(
            (
                f"ranks   {self.world_size} = tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} "
                f"x data {self.data_ranks}",
                f"batch   {b.batch_sequences:,} sequences = data {self.data_ranks} x micro-batches "
                f"{self.num_micro_batches} x sequences {b.micro_batch_sequences}",
                f"step    {b.batch_sequences:,} sequences x {length:,} tokens = {self.batch_tokens:,} tokens",
                f"budget  {self.num_steps:,} steps x {self.batch_tokens:,} tokens = {b.train_tokens:,} tokens",
                f"model   {config.model.num_parameters:,} parameters",
            )
        )


def _check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    for name in ("num_heads", "num_kv_heads", "ffn_size", "vocab_size"):
        value = getattr(model, name)
        require(
            value % parallel.tensor == 0,
            f"model.{name} {value} does not divide by parallel.tensor {parallel.tensor}",
            fix="choose a tensor-parallel size that divides it",
        )
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    require(
        model.num_layers % chunks == 0,
        f"model.num_layers {model.num_layers} does not divide by pipeline {parallel.pipeline} x virtual_pipeline "
        f"{parallel.virtual_pipeline or 1} = {chunks} chunks",
        fix="choose a layout that divides it",
    )
