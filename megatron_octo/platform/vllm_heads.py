"""Attention heads of any width for vLLM's CPU engine, whose kernels know some widths only (32, 64, 80, ...).

Queries, keys and values of another width are filled up with zeros to the next known one. Their products stay what
they are, since vLLM is told the scale apart from the width; the zeros in the output are cut off.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Let vLLM's attention take heads of any width in this process. A second call changes nothing."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if getattr(Attention, "takes_any_width", False):
        return
    known = sorted(CPUAttentionBackend.get_supported_head_sizes())
    build, attend = Attention.__init__, Attention.forward

    def init(self: Any, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        build(self, num_heads, next((width for width in known if width >= head_size), head_size), *args, **kwargs)
        self.width = head_size

    def forward(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if self.width == self.head_size:
            return attend(self, query, key, value, *args, **kwargs)
        filled = (_filled(each, self.width, self.head_size) for each in (query, key, value))
        return attend(self, *filled).unflatten(-1, (-1, self.head_size))[..., : self.width].flatten(-2)

    Attention.__init__, Attention.forward, Attention.takes_any_width = init, forward, True


def _filled(heads: Any, width: int, wider: int) -> Any:
    """[tokens, heads * width] -> [tokens, heads * wider]."""
    import torch

    return torch.nn.functional.pad(heads.unflatten(-1, (-1, width)), (0, wider - width)).flatten(-2)
