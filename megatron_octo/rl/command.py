"""Settings -> OpenRLHF's command line, and its environment. OpenRLHF's own parser checks the result.

Flag names are those of OpenRLHF 0.11.2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_octo.config.rl import LengthStage, RLConfig
from megatron_octo.errors import BadInput, OctoError

PROMPTS, VALIDATION, TENSORBOARD = "prompts.jsonl", "validation.jsonl", "tensorboard"
CHECKPOINTS, FINAL, AGENT = "openrlhf", "openrlhf/final", "openrlhf/agent.py"
GPU_MEMORY_SHARE = 0.6  # of a device, for vLLM; the rest is training's
CHECK_TIMEOUT_S = 120
PACKAGE = Path(__file__).resolve().parents[1]
CPU_PATCHES = PACKAGE / "platform" / "openrlhf_cpu"


def command(config: RLConfig, *, stage: LengthStage, num_episodes: int, cuda: bool) -> list[str]:
    """OpenRLHF's arguments for a stage; pure. Paths in them are absolute: Ray's processes have other working folders.

    Without CUDA what only a GPU can do is left out: sleeping engines, flash attention, NCCL.
    """
    output = config.output.resolve()
    samples = config.prompts_per_step * config.samples_per_prompt
    flags: dict[str, object] = {
        "actor.model_name_or_path": config.model.resolve(),
        "train.agent_func_path": output / AGENT,  # stop strings, validation's length, the reward
        "data.prompt_dataset": output / PROMPTS,
        "data.input_key": "input",
        "data.label_key": "label",
        "data.max_len": config.sequence_tokens(stage),
        # GRPO on outcome rewards, one pass over each rollout
        "algo.advantage.estimator": "group_norm",
        "algo.kl.init_coef": config.kl_coefficient,
        "rollout.batch_size": config.prompts_per_step,
        "rollout.n_samples_per_prompt": config.samples_per_prompt,
        "rollout.temperature": config.temperature,
        "rollout.max_new_tokens": stage.max_response_tokens,
        "train.batch_size": samples // config.updates_per_step,
        "train.max_epochs": 1,
        "train.num_episodes": num_episodes,
        "train.seed": config.seed,
        "actor.adam.lr": config.learning_rate,
        "actor.lr_scheduler": "constant",
        "actor.lr_warmup_ratio": 0.0,
        "actor.eps_clip_low_high": (config.clip_low, config.clip_high),
        # compares vLLM's and the trainer's log-probabilities: logs vllm_kl
        "algo.advantage.is_correction_level": "token",
        "algo.advantage.is_correction_mode": "clip",
        # the devices, shared by rollouts and training
        "actor.num_nodes": config.num_nodes,
        "actor.num_gpus_per_node": config.num_gpus,
        "vllm.num_engines": config.num_devices,
        "vllm.tensor_parallel_size": 1,
        "train.colocate_all": True,
        "ds.zero_stage": config.zero_stage,
        "ds.param_dtype": config.precision,
        "ds.packing_samples": True,
        "train.dynamic_batch_enable": True,
        "train.max_tokens_per_gpu": config.max_tokens_per_gpu,
        "rollout.max_tokens_per_gpu": config.max_tokens_per_gpu,
        "ckpt.path": output / CHECKPOINTS,
        "ckpt.output_dir": output / FINAL,
        "ckpt.save_steps": config.save_every_steps,
        # saves are rotated by rl/saves.py: OpenRLHF deletes a checkpoint before its successor is there, with validation
        # even the newest, and its own best one is a second checkpoint that `latest` then names
        "ckpt.max_num": config.num_steps,
        "ckpt.best_metric_key": "none",
        "ckpt.save_hf": True,
        "ckpt.load_enable": True,
        "logger.tensorboard_dir": output / TENSORBOARD,
        "logger.wandb.run_name": config.name,
    }
    if config.validation.sets:
        flags |= {
            "eval.dataset": output / VALIDATION,
            "eval.steps": config.validation.every_steps,
            "eval.temperature": config.validation.temperature,
            "eval.n_samples_per_prompt": config.validation.samples_per_prompt,
        }
    if config.kl_coefficient > 0:
        flags |= {
            "ref.num_nodes": config.num_nodes,
            "ref.num_gpus_per_node": config.num_gpus,
            "algo.kl.use_loss": True,
            "algo.kl.estimator": "k3",
        }
    if cuda:
        flags |= {
            "vllm.sync_backend": "nccl",
            "vllm.gpu_memory_utilization": GPU_MEMORY_SHARE,
            "vllm.enable_sleep": True,
            "ds.enable_sleep": True,
            "ds.attn_implementation": "flash_attention_2",
            "actor.gradient_checkpointing_enable": True,
        }
    else:
        flags |= {"vllm.sync_backend": "gloo", "vllm.enforce_eager": True}
    return [part for name, value in flags.items() for part in _flag(name, value)]


def _flag(name: str, value: object) -> list[str]:
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(str, values)]


def environment(base: Mapping[str, str], *, cuda: bool) -> dict[str, str]:
    """The environment of OpenRLHF's processes: `base`, with what Ray, DeepSpeed and vLLM need to hear."""
    path = [str(PACKAGE.parent), *filter(None, [base.get("PYTHONPATH")])]
    env = {
        **base,
        # this interpreter's ninja first, always: one ninja compiles again what another's log describes
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{base.get('PATH', '')}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # a step's line must not be taken for a repetition
        "RAY_worker_niceness": "0",  # Ray's 15 would put the run behind everything else on the machine
        "RAY_raylet_start_wait_time_s": "300",  # a loaded machine starts a node slowly
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # all that a run reads is on disk
    }
    # Five processes import the same stack: from source that costs three times as much as from bytecode.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    if not cuda:
        path.insert(0, str(CPU_PATCHES))
        env |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",  # vLLM would compile two small functions for 10 s, in each engine anew
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    env["PYTHONPATH"] = os.pathsep.join(path)
    return env


def check_command(arguments: Sequence[str]) -> None:
    """Let OpenRLHF's own parser and checks judge a command line, in a process that starts nothing else.

    Raises:
        OctoError: OpenRLHF is not installed.
        BadInput: the parser refuses.
    """
    env = environment(os.environ, cuda=True)  # no patches: nothing heavy is imported
    run = subprocess.run(
        [sys.executable, "-m", "megatron_octo.platform.openrlhf_parse", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=CHECK_TIMEOUT_S,
        check=False,
    )
    if "No module named 'openrlhf'" in run.stderr:
        raise OctoError("openrlhf is not installed", fix="`make setup`, or `pip install 'megatron_octo[rl]'`")
    if run.returncode != 0:
        raise BadInput(
            f"OpenRLHF refuses the command line: {(run.stderr or run.stdout).strip().splitlines()[-1]}",
            fix="correct the setting; `octo rl RECIPE --dry-run` prints the command line",
        )
