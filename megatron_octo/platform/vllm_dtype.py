"""vLLM in fp16 under OpenRLHF, which trains in fp16 on request and starts vLLM in bf16 all the same."""

from __future__ import annotations

from typing import Any


def load_as_fp16() -> None:
    """Have every engine that is made in this process from now on load its model in fp16."""
    import vllm

    engine_args = vllm.AsyncEngineArgs

    def in_fp16(*args: Any, **kwargs: Any) -> Any:
        return engine_args(*args, **{**kwargs, "dtype": "float16"})

    vllm.AsyncEngineArgs = in_fp16
