"""The tokens at which the logits of an export are compared: those of a text, else random ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.convert.hf_folder import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

TEXT = Path(__file__).with_name("sample.txt")
"""About a thousand tokens of English and mathematics, our own."""
FEWEST_IDS = 16
"""Different ids that a text must give: a tokenizer that does not know its words turns all into one."""


def tokens(folder: Path, text: Path, *, vocab_size: int, rows: int, length: int) -> tuple[torch.Tensor, str]:
    """Ids [rows, length] of `text`, repeated as often as it takes, and what they are, to tell.

    They are random, of a fixed seed, where the model's `folder` has no tokenizer, or one that cannot make the text.
    """
    import torch

    ids, told = _ids(folder, text), f"tokens of {text.name}"
    if len(set(ids)) < FEWEST_IDS or max(ids) >= vocab_size:
        why = f"makes too little of {text.name}" if has_tokenizer(folder) else "is missing"
        draw = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (rows, length), generator=draw), f"random tokens, since the tokenizer {why}"
    repeats = -(-rows * length // len(ids))
    return torch.tensor(ids * repeats)[: rows * length].reshape(rows, length), told


def _ids(folder: Path, text: Path) -> list[int]:
    """The text's ids; none without a tokenizer."""
    if not has_tokenizer(folder):
        return []
    words = text.read_text(errors="replace")
    ids: list[int] = load_tokenizer(folder)(words, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]  # longer than its limit
    return ids
