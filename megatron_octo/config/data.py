"""What the data stages read and write, and what training mixes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_octo.config.base import Settings, require, require_positive

Template = Literal["text", "question_answer", "long_cot", "chat"]
WEIGHT_SUM_TOLERANCE = 1e-9
CORPORA = ("web", "short", "long", "chat")
MOST_HELDOUT_PROBLEMS = 5_000
MOST_RL_PROBLEMS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig(Settings):
    """One source: text records in, an indexed data set out."""

    name: str
    """The source's name, as mixtures call it."""
    input: Path
    """JSON lines, one record a line."""
    template: Template
    """How a record becomes text: text; question_answer (one line break between); long_cot (question,
    <think> block, answer); chat (`User:{}\\nAssistant:{}`)."""
    tokenizer: Path
    """A Hugging Face tokenizer folder."""
    output: Path
    """The folder to write: shards, manifest.json, DONE."""
    bos: bool = True
    """Begin each document with the beginning-of-text id. The paper does not state it."""
    eos: bool = True
    """End each document with the end-of-text id. The paper does not state it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Settings):
    """One source's place in a mixture."""

    name: str
    """The source's name; appears in the ledger."""
    path: Path
    """A folder that `octo data prepare` wrote."""
    weight: float
    """Share of the budget's tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig(Settings):
    """Sources and how much of each."""

    sources: tuple[SourceConfig, ...]
    """At least one; the weights sum to 1."""
    tokenizer: Path
    """The tokenizer folder that all sources were prepared with; copied into exports."""
    seq_length: int
    """Tokens in a training sequence."""
    shuffle_seed: int = 1234
    """Orders documents and sequences."""

    def __post_init__(self) -> None:
        require_positive(self, "data.", "seq_length")
        require(bool(self.sources), "data.sources is empty", fix="name at least one prepared source")
        total = sum(source.weight for source in self.sources)
        shown = " + ".join(f"{source.name} {source.weight:g}" for source in self.sources)
        require(
            abs(total - 1) <= WEIGHT_SUM_TOLERANCE,
            f"data.sources: the weights sum to {total:.10g}, not to 1 ({shown})",
            fix="change them so that they sum to 1",
        )
        for source in self.sources:
            require(
                source.weight > 0,
                f"data.sources: {source.name} has weight {source.weight:g}",
                fix="leave the source out, or give it a weight above 0",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig(Settings):
    """The seeded corpora and problems of the miniature: sums of small whole numbers, with noisy workings."""

    output: Path
    """The folder to write: web, short, long and chat .jsonl; rl_train.jsonl, heldout.jsonl."""
    seed: int = 0
    """Draws everything but the choice of held-out problems, which is the same for every seed."""
    documents: tuple[tuple[str, int], ...]
    """(corpus, how many documents), corpora among web, short, long, chat."""
    num_rl_problems: int = 640
    """Distinct problems for reinforcement learning."""
    num_heldout_problems: int = 300
    """Distinct problems that occur in no corpus and in no RL prompt, in no order of their numbers."""
    shuffle_answers: bool = False
    """Give each question the working and the answer of another: the control that can learn form only."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.documents]
        require(
            set(names) <= set(CORPORA) and len(set(names)) == len(names),
            f"documents name the corpora {', '.join(names)}",
            fix=f"name each at most once, among: {', '.join(CORPORA)}",
        )
        for name, count in self.documents:
            require(count > 0, f"documents: {count} of {name}", fix="ask for at least one, or leave the corpus out")
        for field, most in (("num_rl_problems", MOST_RL_PROBLEMS), ("num_heldout_problems", MOST_HELDOUT_PROBLEMS)):
            require(
                0 < getattr(self, field) <= most,
                f"{field} {getattr(self, field):,} is not in 1..{most:,}",
                fix="choose a number in that range; there are not many more distinct problems",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig(Settings):
    """A SentencePiece tokenizer to train, digits split, bytes as fall-back."""

    inputs: tuple[PrepareInput, ...]
    """The corpora to learn from."""
    output: Path
    """A Hugging Face tokenizer folder to write (tokenizer.model, tokenizer.json, tokenizer_config.json)."""
    vocab_size: int
    """Pieces, the 256 bytes and the control ids included."""
    documents_per_input: int = 3000
    """Documents of each corpus to learn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareInput(Settings):
    """A text file and how its records become text."""

    input: Path
    """JSON lines."""
    template: Template
    """As in PrepareConfig."""
