"""Sample answers with vLLM. The only module of `evaluate` that imports it.

Each model gets an engine of its own: on a CPU vLLM packs weights when it loads them, so loading others
into a living engine can leave some of the old ones in use without an error. Once vLLM is imported, a new
engine costs about a second.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo import console
from megatron_octo.errors import BadInput
from megatron_octo.platform import bf16_matmul, vllm_cpu, vllm_heads
from megatron_octo.rundir import read_json

CPU_KV_CACHE_BYTES = 2**30
CPU_BATCH_TOKENS = 4096

log = console.logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One sampled answer."""

    problem: int
    """Index of its prompt."""
    sample: int
    """Which of the answers to that prompt."""
    response: str
    """The text after the prompt, without special tokens."""
    tokens: int
    """Tokens sampled, the end-of-text id included."""
    truncated: bool
    """Whether it was cut off at the limit."""


def prepare(models: Sequence[Path]) -> None:
    """Make this process ready to import vLLM for `models`. Call it before anything imports torch."""
    largest = max(sum(file.stat().st_size for file in model.glob("*.safetensors")) for model in models)
    vllm_cpu.prepare(weights_bytes=largest, verbose=log.isEnabledFor(logging.DEBUG))


def prompt_ids(model: Path, prompts: Sequence[str], *, max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, as they stand: no chat template, no beginning-of-text id.

    Raises:
        BadInput: a prompt is empty, or leaves the model fewer than `max_new_tokens` positions.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    positions = read_json(model / "config.json").get("max_position_embeddings")
    for index, each in enumerate(ids):
        if not each:
            raise BadInput(f"problem {index} has no tokens with the tokenizer of {model}", fix="leave it out")
        if positions is not None and len(each) + max_new_tokens > positions:
            raise BadInput(
                f"problem {index} has {len(each):,} tokens; with max_new_tokens {max_new_tokens:,} that is beyond the "
                f"{positions:,} positions of {model}",
                fix=f"max_new_tokens of at most {positions - max(map(len, ids)):,}, or shorter problems",
            )
    return ids


def answers(
    model: Path, prompts: Sequence[Sequence[int]], *, samples: int, temperature: float, max_new_tokens: int, seed: int
) -> Iterator[Answer]:
    """Yield `samples` answers to each prompt, in the order in which they end.

    Every answer has a seed of its own, made of `seed`, the prompt's index and the sample's, so an answer
    does not depend on which others are asked for. Call `prepare` before.
    """
    from vllm import SamplingParams

    engine = _engine(model, positions=max(map(len, prompts)) + max_new_tokens, seed=seed)
    try:
        for problem, ids in enumerate(prompts):
            for sample in range(samples):
                params = SamplingParams(
                    temperature=temperature, max_tokens=max_new_tokens, seed=answer_seed(seed, problem, sample)
                )
                engine.add_request(f"{problem}-{sample}", {"prompt_token_ids": list(ids)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield _answer(output)
    finally:
        engine.engine_core.shutdown()
        del engine
        gc.collect()  # the engine is part of cycles, and holds the KV cache


def answer_seed(seed: int, problem: int, sample: int) -> int:
    """A seed for one answer, unlike any other's."""
    import numpy as np

    return int(np.random.SeedSequence((seed, problem, sample)).generate_state(1)[0])


def _engine(model: Path, *, positions: int, seed: int) -> Any:
    """A vLLM engine of `model` for prompt and answer of together `positions` tokens."""
    from vllm import LLM

    config, on_cpu = read_json(model / "config.json"), vllm_cpu.is_cpu_build()
    if on_cpu:
        vllm_heads.install()
        bf16_matmul.install()
    llm = LLM(
        model=str(model),
        # Left to itself vLLM turns float32 into bfloat16.
        dtype=config.get("dtype") or config.get("torch_dtype") or "auto",
        max_model_len=positions,
        seed=seed,
        use_tqdm_on_load=False,
        **(_cpu_settings(positions) if on_cpu else {}),
    )
    return llm.llm_engine


def _cpu_settings(positions: int) -> dict[str, Any]:
    """Engine settings for a CPU, where kernels take minutes to compile.

    Prompts are never cut in two: for a seeded request whose prompt is, vLLM rewinds the random generator,
    and a CPU generator cannot be.
    """
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCH_TOKENS, positions),
    }


def _answer(output: Any) -> Answer:
    """An Answer of a finished vLLM request; the engine appends to the id it was given."""
    completion = output.outputs[0]
    problem, sample = output.request_id.split("-")[:2]
    return Answer(
        problem=int(problem),
        sample=int(sample),
        response=completion.text,
        tokens=len(completion.token_ids),
        truncated=completion.finish_reason == "length",
    )
