"""What the data stages read and write, and what training mixes."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_octo.config.base import Settings, require, require_positive
from megatron_octo.errors import SettingsError

Template = Literal["text", "question_answer", "long_cot", "chat", "format"]
Loss = Literal["all", "answers"]
WEIGHT_SUM_TOLERANCE = 1e-9
CORPORA = ("web", "short", "long", "chat")
MOST_HELDOUT_PROBLEMS = 5_000
MOST_RL_PROBLEMS = 50_000
LONGEST_RECORD_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource(Settings):
    """Files of a data set on the Hugging Face Hub."""

    repository: str
    """`owner/name`."""
    revision: str = "main"
    """A commit, tag or branch; only a commit pins what is read."""
    files: tuple[str, ...] = ()
    """Patterns of the files' paths in the repository (`data/*.parquet`; `**` stands for folders of any depth), read in
    the order of their names."""
    subset: str = ""
    """With `split`: a part of the data set with a name of its own (a configuration); empty for the default one."""
    split: str = ""
    """The split to read, in place of `files`: the data set's card says which files those are."""
    gated: bool = False
    """Whether the owner wants terms accepted first: such files need HF_TOKEN."""

    def __post_init__(self) -> None:
        require(
            bool(self.files) != bool(self.split) and not (self.files and self.subset),
            f"data set {self.repository} with files {self.files}, subset {self.subset!r} and split {self.split!r}",
            fix="give patterns of files; or a split, and its subset if that is not the default one",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFacts(Settings):
    """What is known of a corpus; nothing of it changes the result."""

    licence: str
    """Its licence, as its owner states it."""
    expected_tokens: int | None = None
    """Tokens that its owner or the paper states."""
    download_bytes: int | None = None
    """Disk that its files take."""
    source: str = ""
    """Where these facts come from."""
    unconfirmed: tuple[str, ...] = ()
    """What of this manifest nobody has confirmed, a sentence each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig(Settings):
    """One source: records in, an indexed data set out."""

    name: str
    """The source's name, as mixtures call it."""
    input: Path | None = None
    """A file, a pattern (`web/*.jsonl.zst`), or a folder that `datasets` saved. JSON lines (plain, .gz, .zst),
    .parquet or .arrow, told apart by the name. Several files are read in the order of their names."""
    hub: HubSource | None = None
    """Files on the Hub, in place of `input`."""
    facts: CorpusFacts | None = None
    """Licence, size and what is unconfirmed; shown, not used."""
    columns: tuple[tuple[str, str], ...] = ()
    """(field of the template, column of the record) where the names differ: (("question", "problem"),). A column may
    lie inside of another (`meta.question`, `generations.0`), or be chosen: `generations[correct]` is the first item
    of the list `generations` whose item in the list `correct` is true; a record that has none is left out."""
    id_column: str | None = None
    """A column to keep beside each document (NNNNN.ids, a JSON value a line)."""
    template: Template
    """How a record becomes text: text; question_answer (one line break between); long_cot (question,
    <think> block, answer); chat (`User:{}\\nAssistant:{}`); format (`format_string`)."""
    format_string: str = ""
    """For template `format`: text with {column} in it, a text or a number; {{ and }} are braces."""
    chat_models: tuple[str, ...] = ()
    """For template `chat`: keep conversations whose `model` column begins with one of these; empty keeps all."""
    tokenizer: Path
    """A folder with tokenizer.json or tokenizer.model, or such a file; Llama-3's tiktoken file is one of the latter."""
    output: Path
    """The folder to write: shards, manifest.json, DONE."""
    bos: bool = True
    """Begin each document with the beginning-of-text id. The paper does not state it."""
    eos: bool = True
    """End each document with the end-of-text id. The paper does not state it."""
    bos_token: str | None = None
    """How the token that begins documents is spelt; None for the tokenizer's own."""
    eos_token: str | None = None
    """How the token that ends documents is spelt; None for the tokenizer's own. For Llama 3 that is <|end_of_text|>,
    though the folders of its chat models state <|eot_id|>."""
    mark_answers: bool = False
    """Write NNNNN.loss, a byte a token: 1 where the token is part of an answer (or is the id that ends the
    document), for mixtures with loss on answers only. Not for templates text and format."""
    control_text: Literal["ordinary", "bad"] = "ordinary"
    """Text that spells a control token: tokens of its letters, counted in the manifest; or a bad record."""
    validation_share: float = 0.0
    """Share of the documents, chosen by the hash of their text, that goes to validation shards instead."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """At a record that cannot be read or lacks a field: stop, or write it to rejected.jsonl with the reason."""
    most_bad_share: float = 0.01
    """With `skip`: stop when more than this share of the records is bad."""
    longest_record_bytes: int = LONGEST_RECORD_BYTES
    """A longer record is a bad one, and no more than this of it is held in memory."""
    piece_bytes: int = 1 << 20
    """Text that a worker takes at once."""
    shard_tokens: int = 1 << 30
    """End a shard with the piece that reaches this. When the process is killed, the shard that was open is lost."""

    def __post_init__(self) -> None:
        require_positive(self, "prepare.", "longest_record_bytes", "piece_bytes", "shard_tokens")
        require(
            (self.input is None) != (self.hub is None),
            f"source {self.name} has {'both input and hub' if self.input else 'neither input nor hub'}",
            fix="give one of them",
        )
        for name in ("validation_share", "most_bad_share"):
            share = getattr(self, name)
            require(0 <= share < 1, f"source {self.name}: {name} {share:g} is not in 0..1", fix="give a share below 1")
        require(
            (self.template == "format") == bool(self.format_string),
            f"source {self.name}: template {self.template} with format_string {self.format_string!r}",
            fix="give template 'format' its format_string, and no other",
        )
        asked = [column for _, column in parse_format(self.format_string) if column] if self.format_string else []
        for column in (*asked, *(column for _, column in self.columns)):
            _check_column(self.name, column)
        require(
            not self.chat_models or self.template == "chat",
            f"source {self.name}: chat_models with template {self.template}",
            fix="leave chat_models out",
        )
        require(
            not self.mark_answers or self.template not in ("text", "format"),
            f"source {self.name}: mark_answers with template {self.template}, which has no answer",
            fix="leave mark_answers out",
        )


def parse_format(format_string: str) -> list[tuple[str, str]]:
    """A format string as (text, the column behind it; empty behind the last).

    Raises:
        SettingsError: it is none, names no column, or asks for more than columns as they are.
    """
    what = f"format_string {format_string!r}"
    try:
        parsed = list(string.Formatter().parse(format_string))
    except ValueError as error:
        raise SettingsError(f"{what} is broken: {error}", fix="write columns {so}, and braces {{ }}") from None
    require(any(column is not None for _, column, _, _ in parsed), f"{what} names no column", fix="write columns {so}")
    for _, column, spec, conversion in parsed:
        require(column != "", f"{what} has braces without a column", fix="name one; braces of the text are {{ }}")
        require(
            not spec and not conversion,
            f"{what} asks for {column!r} in another form ({conversion or spec}), which nobody makes",
            fix=f"write {{{column}}}, and change the column itself beforehand",
        )
    return [(text, column or "") for text, column, _, _ in parsed]


def parse_choice(column: str) -> tuple[str, str] | None:
    """(list, flags) of a column `list[flags]`, None for another."""
    match = re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", column)
    return (match[1], match[2]) if match else None


def _check_column(source: str, column: str) -> None:
    values, flags = parse_choice(column) or (column, "")
    require(
        not set("[]") & set(values) and not flags.isdecimal(),
        f"source {source}: column {column!r} is no place in a record",
        fix="write list[flags] for the item whose flag is true, list.0 for the first",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Settings):
    """One source's place in a mixture."""

    name: str
    """The source's name; appears in the ledger."""
    path: Path
    """A folder that `octo data prepare` wrote."""
    weight: float
    """Share of the budget's tokens."""
    loss: Loss = "all"
    """Learn from all tokens (the paper), or from answers only (needs `mark_answers` at preparation)."""
    max_epochs: float = 4.0
    """Refuse a budget that reads the source more often than this."""


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
    across_documents: bool = True
    """Attend across the borders of the documents packed into a sequence (megatron's default); False cuts
    attention there and counts positions anew."""

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
