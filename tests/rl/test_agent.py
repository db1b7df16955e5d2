"""The file that OpenRLHF loads for its samples, loaded and called as OpenRLHF does it."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.rl import RewardTerms, RLConfig, ValidationConfig
from megatron_octo.platform import vllm_dtype
from megatron_octo.rl import agent

pytestmark = pytest.mark.usefixtures("openrlhf_agent")
PROMPT = "Question:\nFind 2+3, as in \\boxed{4}.\nAnswer:\n"


class CharacterTokenizer:
    """One id a character; 0 is </s>."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([[ord(character) for character in text]])}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(i) if i else "" if skip_special_tokens else "</s>" for i in ids)


class Engine:
    """vLLM that always gives one response, and keeps what it was asked for."""

    def __init__(self, response: str) -> None:
        self.response = response
        self.asked: list[Any] = []

    async def generate(self, prompt_ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        self.asked.append(params)
        ids = [*map(ord, self.response), 0]
        log_probs = None if params.logprobs is None else [{i: SimpleNamespace(logprob=-0.5)} for i in ids]
        output = SimpleNamespace(token_ids=ids, logprobs=log_probs, finish_reason="stop")
        return SimpleNamespace(outputs=[output])


def loaded(config: RLConfig) -> Any:
    """The executor of a run's folder."""
    rundir.write_json(config.output / "config.json", to_dict(config))
    path = config.output / "openrlhf" / "agent.py"
    rundir.write_atomic(path, agent.FILE)
    spec = importlib.util.spec_from_file_location("agent_module", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AgentExecutor()


def sample(
    config: RLConfig, response: str, label: Any = "5", *, logprobs: int | None = None
) -> tuple[dict[str, Any], Any, Any]:
    """A sample, what OpenRLHF asked of vLLM, and what vLLM heard."""
    engine, params = Engine(response), SimpleNamespace(max_tokens=64, logprobs=logprobs, stop=[])
    arguments = {"prompt": PROMPT, "label": label, "sampling_params": params, "max_length": 512, "images": None}
    coroutine = loaded(config).execute(**arguments, hf_tokenizer=CharacterTokenizer(), llm_engine=engine)
    result: dict[str, Any] = asyncio.run(coroutine)
    return result, params, engine.asked[0]


def test_openrlhf_knows_the_class(config: RLConfig, openrlhf_agent: Any) -> None:
    assert isinstance(loaded(config), openrlhf_agent.AgentExecutorBase)


def test_a_response_is_graded_and_its_tokens_are_those_that_vllm_gave(config: RLConfig) -> None:
    out, _, _ = sample(config, "So \\boxed{5}.")
    assert (out["reward"], out["scores"], out["truncated"]) == (1.0, 1.0, False)
    logs = {"acc": 1.0, "boxed": 1.0, "repetition": 0.0, "reward_error": 0.0}
    assert out["extra_logs"].items() >= logs.items()
    (start, end), ids = out["action_ranges"][0], out["observation_tokens"]
    assert (start, ids[start:end]) == (len(PROMPT), [*map(ord, "So \\boxed{5}."), 0])


def test_signals_come_from_the_response_s_own_tokens(config: RLConfig) -> None:
    right, wrong = (sample(config, text, logprobs=1)[0]["extra_logs"] for text in ("\\boxed{5}", "So \\boxed{6}"))
    assert (right["boxed_at_start"], wrong["boxed_at_start"]) == (1.0, 0.0)
    assert (right["right_tokens"], wrong["right_tokens"]) == (len("\\boxed{5}") + 1, 0.0)
    assert right["entropy"] == wrong["entropy"] == 0.5, "the prompt's tokens do not count"


def test_a_box_in_the_prompt_is_no_answer(config: RLConfig) -> None:
    assert sample(config, "I do not know.", label="4")[0]["extra_logs"]["boxed"] == 0.0


def test_the_run_s_own_terms_reach_the_reward(config: RLConfig) -> None:
    out, _, _ = sample(replace(config, reward=RewardTerms(format=0.5)), "5")
    assert (out["reward"], out["scores"]) == (-1.5, 0.0)


def test_stop_strings_reach_vllm_and_stay_in_the_response(config: RLConfig) -> None:
    _, params, heard = sample(replace(config, stop=("Question:", "User:")), "5")
    assert (heard.stop, heard.include_stop_str_in_output) == (["Question:", "User:"], True)
    assert heard.max_tokens == 64, "a rollout keeps the stage's length"
    assert params.stop == [], "OpenRLHF shares one object between samples"


def test_validation_has_its_own_length_and_counts_right_answers(config: RLConfig) -> None:
    asked = replace(config, validation=ValidationConfig(max_response_tokens=96), reward=RewardTerms(format=0.5))
    for response, value in (("\\boxed{5}", 1.0), ("\\boxed{6}", 0.0)):
        out, params, heard = sample(asked, response, label={"validation": "5"})
        assert (out["reward"], heard.max_tokens, params.max_tokens) == (value, 96, 64)


def test_a_label_that_is_not_text_is_still_compared(config: RLConfig) -> None:
    assert sample(config, "\\boxed{5}", label=5)[0]["reward"] == 1.0


def test_fp16_is_asked_of_vllm_too(config: RLConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(agent, "load_as_fp16", lambda: asked.append(1))
    loaded(config)
    assert not asked
    loaded(replace(config, precision="fp16"))
    assert asked


def test_vllm_s_engines_load_in_fp16_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    vllm = SimpleNamespace(AsyncEngineArgs=lambda *args, **kwargs: made.update(kwargs, args=args))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    vllm_dtype.load_as_fp16()
    vllm.AsyncEngineArgs("model", dtype="bfloat16", seed=3)
    assert made == {"args": ("model",), "dtype": "float16", "seed": 3}
