"""The reward file, loaded and called as OpenRLHF does it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_octo.rl import reward
from megatron_octo.rl.reward import response_of, reward_func

pytest.importorskip("openrlhf", reason="openrlhf is not installed")
PROMPT = "Question:\nFind 2+3.\nAnswer:\n"


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """OpenRLHF's module that loads and calls reward files; its package's other modules (DeepSpeed) are not needed."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.origin is not None
    package: Any = types.ModuleType("openrlhf.utils")
    package.__path__ = [str(Path(spec.origin).parent / "utils")]
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "openrlhf.utils", package)
    yield importlib.import_module("openrlhf.utils.agent")
    for name in set(sys.modules) - before:
        if name.startswith("openrlhf"):
            del sys.modules[name]


class CharacterTokenizer:
    """One id a character; 0 is </s>."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([[ord(character) for character in text]])}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(i) if i else "" if skip_special_tokens else "</s>" for i in ids)


class Engine:
    """vLLM that always gives one response."""

    def __init__(self, response: str) -> None:
        self.response = response

    async def generate(self, prompt_ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        output = SimpleNamespace(token_ids=[*map(ord, self.response), 0], logprobs=None, finish_reason="stop")
        return SimpleNamespace(outputs=[output])


def sample(agent: Any, response: str, label: Any = "5") -> dict[str, Any]:
    executor = agent.SingleTurnAgentExecutor([reward.__file__])
    params = SimpleNamespace(max_tokens=64, logprobs=None)
    coroutine = executor.execute(PROMPT, label, params, 512, CharacterTokenizer(), Engine(response))
    result: dict[str, Any] = asyncio.run(coroutine)
    return result


@pytest.mark.parametrize(
    ("response", "value", "logs"),
    [
        ("2+3=5\nThe answer is \\boxed{5}.", 1.0, (1.0, 1.0, 0.0)),
        ("The answer is \\boxed{6}.", -1.0, (0.0, 1.0, 0.0)),
        ("The answer is 5.", -1.0, (0.0, 0.0, 0.0)),
        ("\\boxed{" * 2000, -1.0, (0.0, 0.0, 0.0)),
        ("", -1.0, (0.0, 0.0, 0.0)),
    ],
)
def test_openrlhf_gets_plus_one_or_minus_one_and_the_logs(
    agent: Any, response: str, value: float, logs: tuple[float, ...]
) -> None:
    out = sample(agent, response)
    assert float(out["reward"]) == value
    assert float(out["scores"]) == logs[0]
    assert tuple(float(out["extra_logs"][name]) for name in ("acc", "boxed", "reward_error")) == logs


def test_a_label_that_is_not_text_is_still_compared(agent: Any) -> None:
    assert float(sample(agent, "\\boxed{5}", label=5)["reward"]) == 1.0


def test_a_failure_inside_scores_as_wrong_and_raises_a_flag(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(answer: str, reference: str) -> bool:
        raise MemoryError

    monkeypatch.setattr("megatron_octo.grading.answers_equal", broken)
    out = sample(agent, "\\boxed{5}")
    assert (float(out["reward"]), float(out["extra_logs"]["reward_error"])) == (-1.0, 1.0)


def test_a_box_in_the_prompt_is_not_the_answer() -> None:
    prompt = "Put the answer in \\boxed{}, as in \\boxed{5}.\n"
    assert float(reward_func([prompt + "I do not know.</s>"], [prompt], ["5"])["rewards"]) == -1.0


def test_control_tokens_are_no_part_of_the_response() -> None:
    assert response_of("<s>Q\nA: \\boxed{5}<|eot_id|></s><pad>", "Q\nA: ") == "\\boxed{5}"


def test_a_query_without_its_prompt_is_an_error_and_wrong() -> None:
    out = reward_func(["\\boxed{5}"], ["Q"], ["5"])
    assert (float(out["rewards"]), float(out["extra_logs"]["reward_error"])) == (-1.0, 1.0)


def test_each_query_of_several_is_graded() -> None:
    out = reward_func(["Q\\boxed{5}", "Q\\boxed{6}"], ["Q", "Q"], ["5", "5"])
    assert out["rewards"].tolist() == [1.0, -1.0]
    assert out["extra_logs"]["boxed"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("query", "prompt"), [("Q\\boxed{5}", None), (None, "Q")])
def test_what_is_not_text_is_an_error_and_no_exception(query: Any, prompt: Any) -> None:
    out = reward_func([query], [prompt], ["5"])
    assert (float(out["rewards"]), float(out["extra_logs"]["reward_error"])) == (-1.0, 1.0)
