"""What OpenRLHF asks for each response (`--train.agent_func_path`): generation with our settings, then our reward.

OpenRLHF's own sampling has no stop strings, and its validation has the length of the rollouts. It loads a class without
parameters from a file by path; so each run's folder gets such a file, which reads the run's settings.
"""

from __future__ import annotations

import asyncio
from copy import deepcopy
from typing import Any

from megatron_octo.config.rl import RLConfig
from megatron_octo.platform.vllm_dtype import load_as_fp16
from megatron_octo.rl import signals
from megatron_octo.rl.reward import reward

FILE = '''"""OpenRLHF loads this file in each vLLM process. Written by `octo rl`."""

from pathlib import Path

from megatron_octo.config.base import read_settings
from megatron_octo.config.rl import RLConfig
from megatron_octo.rl.agent import executor

AgentExecutor = executor(read_settings(RLConfig, Path(__file__).parents[1] / "config.json"))
'''
VALIDATION = "validation"
"""The key in a validation problem's label: nothing else that OpenRLHF hands over tells it from a rollout's."""


def executor(config: RLConfig) -> type:
    """The class that OpenRLHF makes one of in each vLLM process, before vLLM loads the model."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    if config.precision == "fp16":
        load_as_fp16()

    class Executor(SingleTurnAgentExecutor):
        """Has OpenRLHF sample a response, and grades it here: OpenRLHF would swallow what a reward raises."""

        async def execute(self, *, label: Any, sampling_params: Any, hf_tokenizer: Any, **rest: Any) -> dict[str, Any]:
            validates = isinstance(label, dict)
            params = adapted(sampling_params, config, validates=validates)
            sample = await super().execute(label=label, sampling_params=params, hf_tokenizer=hf_tokenizer, **rest)
            ((start, end),) = sample["action_ranges"]
            response = hf_tokenizer.decode(sample["observation_tokens"][start:end], skip_special_tokens=True)
            answer = str(label[VALIDATION] if validates else label)
            graded = await asyncio.to_thread(reward, response, answer, config.reward)
            right = float(graded.correct)
            log_probs = (sample["rollout_log_probs"] or [])[start:end]  # validation has none
            logs = graded.logs() | signals.of_response(response, log_probs, right=graded.correct)
            # what OpenRLHF calls pass1 is the mean of "reward"
            value = right if validates else graded.value
            return {**sample, "reward": value, "scores": right, "extra_logs": logs}

    return Executor


def adapted(sampling_params: Any, config: RLConfig, *, validates: bool) -> Any:
    """vLLM's SamplingParams with the stop strings, and with validation's length where it is one."""
    params = deepcopy(sampling_params)
    params.stop = list(config.stop)
    params.include_stop_str_in_output = True
    if validates:
        params.max_tokens = config.validation.max_response_tokens
    return params
