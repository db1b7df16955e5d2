"""R1-Zero from the branches: GRPO on MATH8K, as the OctoThinker paper sets it up.

Where the numbers come from (arXiv 2506.20512 and its public code):

  stated    128 prompts x 16 responses a rollout step, two updates on them, rate 1e-6 constant, KL 0, temperature 1;
            responses of up to 4,096 tokens; for the long branch 2,048, 4,096 after 200 updates, 8,192 after 320: after
            100 and 160 rollout steps; 400 updates, so 200 rollout steps, in most figures; a response ends at "User:",
            "Assistant:", "Question:" or "Answer:"
  inferred  that MATH8K is SimpleRL's set of 8,523 problems; the complex template for long and hybrid, whose released
            scripts have it, and the simple one elsewhere
  ours      the schedule and the length of 1B and 8B, for which no script was released; when to save; the layout; the
            length of validation, that of the last stage throughout (the paper's is the stage's, and its scores jump)

The released scripts, for the 3B's long and hybrid branches, disagree with the paper: 256 prompts and 16 updates. The
recipes that end in `official_script` are theirs.

What a recipe reads lies in $OCTO_RUNS (default: runs). The branches' exports, by

    octo convert to-hf runs/llama32-3b-decay-long runs/llama32-3b-decay-long/hf/step_00005000

the base models in runs/hf/NAME, and the problems in runs/prompts/math8k, by

    hf download alterego238/simplerl-math8k --repo-type dataset --revision refs/convert/parquet \\
        --local-dir runs/prompts/math8k

190 of these problems share 13 words with one of MATH500, 217 if its solutions count (decontaminate_against, which reads
all texts of a file, leaves them out; the paper does not).

Without more, a run is not validated, and its best save is the one with the highest reward. The paper asks four sets of
problems, every 4 rollout steps and greedily: name files that you have, and their columns where those are not `input`
and `label`. They are not shipped; the columns are those of the data sets' own files, as public code reads them.

    octo rl recipes/rl_zero.py:llama32_3b_long --validation.sets \\
        AMC23=runs/prompts/amc23.jsonl:question:answer GSM8K=runs/prompts/gsm8k.jsonl:question:answer \\
        MATH500=runs/prompts/math500.jsonl:problem:answer \\
        OlympiadBench=runs/prompts/olympiadbench.jsonl:question:final_answer.0

Hardware: one node of 8 GPUs of 80 GB holds every size: of the 8B, 16 bytes a parameter over 8 GPUs are 16 GB of
training state a GPU, and vLLM's own copy is 16 GB of its 48 (60%). A second node (`--num-nodes 2`) is for time: it
halves what each engine has to generate, of which the 8,192 tokens of the long branch have most. What is left then
depends on the fabric, over which ZeRO gathers weights. Time and scores: not yet measured.
"""

from dataclasses import replace

from megatron_octo.config.rl import LongerResponses, RLConfig, ValidationConfig
from megatron_octo.rundir import run_folder, step_folder

NUM_STEPS = 200
DECAY_STEPS = 5_000
LONG_SCHEDULE = (
    LongerResponses(after_step=100, max_response_tokens=4096),
    LongerResponses(after_step=160, max_response_tokens=8192),
)


def llama32_1b_short() -> RLConfig:
    """Llama-3.2-1B, short branch."""
    return _branch("llama32-1b", "short")


def llama32_1b_long() -> RLConfig:
    """Llama-3.2-1B, long branch, longer responses by and by."""
    return _branch("llama32-1b", "long")


def llama32_1b_hybrid() -> RLConfig:
    """Llama-3.2-1B, hybrid branch."""
    return _branch("llama32-1b", "hybrid")


def llama32_3b_short() -> RLConfig:
    """Llama-3.2-3B, short branch."""
    return _branch("llama32-3b", "short")


def llama32_3b_long() -> RLConfig:
    """Llama-3.2-3B, long branch, longer responses by and by."""
    return _branch("llama32-3b", "long")


def llama32_3b_hybrid() -> RLConfig:
    """Llama-3.2-3B, hybrid branch."""
    return _branch("llama32-3b", "hybrid")


def llama31_8b_short() -> RLConfig:
    """Llama-3.1-8B, short branch."""
    return _branch("llama31-8b", "short")


def llama31_8b_long() -> RLConfig:
    """Llama-3.1-8B, long branch, longer responses by and by."""
    return _branch("llama31-8b", "long")


def llama31_8b_hybrid() -> RLConfig:
    """Llama-3.1-8B, hybrid branch."""
    return _branch("llama31-8b", "hybrid")


def llama32_3b_base() -> RLConfig:
    """Llama-3.2-3B without mid-training: what the branches are compared with."""
    return _base("llama32-3b")


def qwen25_3b_base() -> RLConfig:
    """Qwen2.5-3B by the same recipe: what the branches are to reach."""
    return _base("qwen25-3b")


def llama32_3b_long_official_script() -> RLConfig:
    """Llama-3.2-3B, long branch, with the released script's batch: 256 prompts, 16 updates a rollout step."""
    return _official_script(llama32_3b_long())


def llama32_3b_hybrid_official_script() -> RLConfig:
    """Llama-3.2-3B, hybrid branch, with the released script's batch: 256 prompts, 16 updates a rollout step."""
    return _official_script(llama32_3b_hybrid())


def _branch(model: str, branch: str) -> RLConfig:
    config = _base(model)
    is_long = branch == "long"
    return replace(
        _renamed(config, f"{model}-rl-{branch}"),
        model=run_folder(f"{model}-decay-{branch}") / "hf" / step_folder(run_folder(model), DECAY_STEPS).name,
        template="simple" if branch == "short" else "complex",
        max_response_tokens=2048 if is_long else 4096,
        longer_responses=LONG_SCHEDULE if is_long else (),
        validation=ValidationConfig(max_response_tokens=8192 if is_long else 4096),
    )


def _base(model: str) -> RLConfig:
    name = f"{model}-rl-base"
    return RLConfig(
        name=name,
        model=run_folder("hf") / model,
        prompts=run_folder("prompts") / "math8k" / "default" / "train" / "0000.parquet",
        question_column="problem",
        answer_column="answer",
        template="simple",
        output=run_folder(name),
        num_steps=NUM_STEPS,
    )


def _official_script(config: RLConfig) -> RLConfig:
    return replace(_renamed(config, f"{config.name}-official-script"), prompts_per_step=256, updates_per_step=16)


def _renamed(config: RLConfig, name: str) -> RLConfig:
    return replace(config, name=name, output=run_folder(name))
