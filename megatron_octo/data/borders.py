"""Where documents meet inside a micro-batch: what attention needs to stop there, and positions to begin anew.

The rule is that of megatron's `_get_ltor_masks_and_position_ids` with reset_position_ids and reset_attention_mask:
a document ends with its end-of-text id. No [s, s] mask is made.

Shapes: b sequences of a micro-batch, s tokens of a sequence, d documents or parts of them in all b sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cut_at_documents(batch: dict[str, torch.Tensor], eos_id: int) -> dict[str, torch.Tensor]:
    """The micro-batch as one row of documents, in the form that megatron's PackedSeqParams take.

    Args:
        batch: `tokens` and others, each [b, s].
        eos_id: the id that ends a document; it belongs to the document that it ends.

    Returns:
        All of `batch`, each [1, b * s], with `position_ids` from 0 in each document, and besides: `cu_seqlens`
        int32 [d + 1], where documents begin, from 0 to b * s; `max_seqlen` [], the length of the longest.
    """
    import torch

    ends = batch["tokens"] == eos_id
    ends[:, -1] = True  # a sequence is never seen from the next
    borders = torch.cat([ends.new_zeros(1, dtype=torch.long), ends.flatten().nonzero().flatten() + 1])
    lengths = borders.diff()
    positions = torch.arange(ends.numel(), device=ends.device) - borders[:-1].repeat_interleave(lengths)
    return {
        **{key: value.reshape(1, -1) for key, value in batch.items()},
        "position_ids": positions[None],
        "cu_seqlens": borders.int(),
        "max_seqlen": lengths.max(),
    }
