"""The tokens at which the logits of both models are compared: those of a text, else random ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.convert.hf_folder import has_tokenizer, load_tokenizer
from megatron_octo.errors import BadInput

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

    ids, why = _ids(folder, text)
    if len(set(ids)) < FEWEST_IDS or max(ids) >= vocab_size:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (rows, length), generator=draw), f"random tokens, since the tokenizer {why}"
    repeats = -(-rows * length // len(ids))
    return torch.tensor(ids * repeats)[: rows * length].reshape(rows, length), f"tokens of {text.name}"


def _ids(folder: Path, text: Path) -> tuple[list[int], str]:
    """The text's ids, and what the tokenizer lacks where they are too few."""
    if not has_tokenizer(folder):
        return [], "is missing"
    try:
        tokenizer = load_tokenizer(folder)
    except BadInput:  # an import does not need it
        return [], "cannot be loaded"
    words = text.read_text(errors="replace")
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]  # longer than its limit
    return ids, f"makes too little of {text.name}"
