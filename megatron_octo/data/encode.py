"""One piece of a file -> the token ids of its documents. What a worker does; it knows nothing of files or shards."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.indexed import TokenType, token_type
from megatron_octo.data.read import Piece, raw_records, records
from megatron_octo.data.templates import BadRecord, Render, Rendered, look_up, renderer
from megatron_octo.data.tokenizer import Encoded, Tokenizer
from megatron_octo.errors import BadInput

HASH_BYTES = 8
LONGEST_RAW = 100_000  # characters of a bad record that are kept


@dataclass(kw_only=True, slots=True)
class Documents:
    """Documents of a piece, in their order."""

    ids: np.ndarray
    """Their ids, one after the other, in the shards' number format."""
    lengths: np.ndarray
    """int32, tokens of each."""
    marks: np.ndarray | None
    """uint8, one a token: 1 in answers; None where they are not asked for."""
    names: list[bytes] | None
    """Their own ids as JSON; None where they are not asked for."""
    text_bytes: int
    """UTF-8 bytes of their texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bad:
    """A bad record."""

    number: int
    """Its line or row, from 1."""
    reason: str
    raw: str
    """The record as it stands in the file, cut where it is very long."""


@dataclass(kw_only=True, slots=True)
class EncodedPiece:
    """All that is made of a piece."""

    train: Documents
    validation: Documents
    bad: list[Bad] = field(default_factory=list)
    filtered: int = 0
    num_records: int = 0
    """All of them, bad and filtered ones included."""
    control_texts: Counter[str] = field(default_factory=Counter)
    """How often the texts spell a control token."""


@dataclass(slots=True)
class _Text:
    rendered: Rendered
    name: bytes | None
    held_out: bool


def text_renderer(config: PrepareConfig, *, keep_empty: bool = False) -> Render:
    """The function from a source's records to their texts."""
    return renderer(
        config.template,
        columns=config.columns,
        format_string=config.format_string,
        chat_models=config.chat_models,
        keep_empty=keep_empty,
    )


def encoder(
    config: PrepareConfig, tokenizer: Tokenizer, *, keep_empty: bool = False
) -> Callable[[Piece], EncodedPiece]:
    """The function from a piece to what is made of it. It depends on nothing else, so any process may call it."""
    render = text_renderer(config, keep_empty=keep_empty)
    begin = [tokenizer.bos_id] if config.bos and tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if config.eos and tokenizer.eos_id is not None else []
    dtype, held_out = token_type(tokenizer.vocab_size), _held_out(config.validation_share)
    borders = [index for index in (tokenizer.bos_id, tokenizer.eos_id) if index is not None]
    controls_pattern = _pattern(tokenizer.controls)

    def read(piece: Piece, out: EncodedPiece) -> list[_Text]:
        texts: list[_Text] = []
        reasons: dict[int, str] = {}
        for number, record in records(piece):
            out.num_records += 1
            try:
                if isinstance(record, BadRecord):
                    raise record
                rendered = render(record)
                if rendered is None:
                    out.filtered += 1
                    continue
                controls = Counter(controls_pattern.findall(rendered.text))
                if controls and config.control_text == "bad":
                    raise BadRecord(f"spells the control token {min(controls)}")
                name = _name(look_up(record, config.id_column)) if config.id_column else None
            except BadRecord as bad:
                reasons[number] = str(bad)
                continue
            out.control_texts.update(controls)
            texts.append(_Text(rendered, name, held_out(rendered.text)))
        raw = raw_records(piece, list(reasons), LONGEST_RAW)
        for (number, reason), record in zip(reasons.items(), raw, strict=True):
            out.bad.append(Bad(number=number, reason=reason, raw=record))
        return texts

    def documents(texts: Sequence[_Text]) -> Documents:
        encoded = tokenizer.encode_flat([each.rendered.text for each in texts])
        _check_not_forged(encoded, borders, texts)
        ids, lengths = (_framed_if_any if keep_empty and not begin else _framed)(encoded, begin, end, dtype)
        marks = None
        if config.mark_answers:
            marks = _framed_marks(_marks(encoded, [each.rendered for each in texts], tokenizer), encoded, begin, end)
        return Documents(
            ids=ids,
            lengths=lengths,
            marks=marks,
            names=[each.name or b"" for each in texts] if config.id_column else None,
            text_bytes=sum(len(each.rendered.text.encode()) for each in texts),
        )

    def encode(piece: Piece) -> EncodedPiece:
        out = EncodedPiece(train=documents([]), validation=documents([]))
        texts = read(piece, out)
        out.train = documents([each for each in texts if not each.held_out])
        if config.validation_share:
            out.validation = documents([each for each in texts if each.held_out])
        return out

    return encode


def _held_out(share: float) -> Callable[[str], bool]:
    """Whether a text goes to the validation split: its hash alone decides, so a growing corpus moves none."""
    border = int(share * 2 ** (8 * HASH_BYTES))

    def decide(text: str) -> bool:
        if not border:
            return False
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()) < border

    return decide


def _pattern(controls: Sequence[str]) -> re.Pattern[str]:
    """What finds control tokens in a text, all in one pass; of two that begin alike the longer one."""
    return re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or "(?!)")


def _check_not_forged(encoded: Encoded, borders: Sequence[int], texts: Sequence[_Text]) -> None:
    """Refuse a tokenizer whose model holds its control tokens as words: it would end documents inside of texts.

    Raises:
        BadInput: a text became the id that begins or ends documents.
    """
    forged = np.flatnonzero(np.isin(encoded.ids, borders))
    if len(forged):
        number = int(np.searchsorted(encoded.offsets, forged[0], side="right")) - 1
        raise BadInput(
            f"the tokenizer gives the control id {int(encoded.ids[forged[0]])} for ordinary text, in "
            f"{texts[number].rendered.text[:60]!r}",
            fix="leave such records out (control_text='bad', on_bad_record='skip'), or use a byte-level tokenizer",
        )


def _name(value: object) -> bytes:
    import orjson

    try:
        return orjson.dumps(value)
    except TypeError:
        raise BadRecord(f"the id is no JSON value but {type(value).__name__}") from None


def _framed(
    encoded: Encoded, begin: Sequence[int], end: Sequence[int], dtype: TokenType
) -> tuple[np.ndarray, np.ndarray]:
    """(ids with `begin` before and `end` after each text, int32 lengths)."""
    lengths = np.diff(encoded.offsets)
    out = np.empty(len(encoded.ids) + len(lengths) * (len(begin) + len(end)), dtype)
    body, starts, ends = _places(encoded, len(begin), len(end))
    out[body] = encoded.ids
    for shift, index in enumerate(begin):
        out[starts + shift] = index
    for shift, index in enumerate(end):
        out[ends + shift] = index
    return out, (lengths + len(begin) + len(end)).astype(np.int32)


def _framed_if_any(
    encoded: Encoded, begin: Sequence[int], end: Sequence[int], dtype: TokenType
) -> tuple[np.ndarray, np.ndarray]:
    """The same, but a text that has no ids stays without any."""
    some = np.diff(encoded.offsets) > 0
    ids, found = _framed(Encoded(encoded.ids, encoded.offsets[np.append(some, True)]), begin, end, dtype)
    lengths = np.zeros(len(some), np.int32)
    lengths[some] = found
    return ids, lengths


def _framed_marks(marks: np.ndarray, encoded: Encoded, begin: Sequence[int], end: Sequence[int]) -> np.ndarray:
    """The marks with 0 for the ids before a text, and for those after it the mark of its last token."""
    count = len(encoded.offsets) - 1
    out = np.zeros(len(marks) + count * (len(begin) + len(end)), np.uint8)
    body, _, ends = _places(encoded, len(begin), len(end))
    out[body] = marks
    last = encoded.offsets[1:] - 1
    some = np.diff(encoded.offsets) > 0
    for shift in range(len(end)):
        out[ends[some] + shift] = marks[last[some]]
    return out


def _places(encoded: Encoded, before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where ids go when every text has `before` ids in front and `after` behind; where these begin.

    The former is a mask: indices would take more memory than all else.
    """
    shift = np.arange(len(encoded.offsets) - 1) * (before + after)
    starts, ends = encoded.offsets[:-1] + shift, encoded.offsets[1:] + shift + before
    body = np.ones(len(encoded.ids) + len(shift) * (before + after), bool)
    for added, count in ((starts, before), (ends, after)):
        body[(added[:, None] + np.arange(count)).ravel()] = False
    return body, starts, ends


def _marks(encoded: Encoded, texts: Sequence[Rendered], tokenizer: Tokenizer) -> np.ndarray:
    """uint8 [tokens]: 1 where a token is part of an answer.

    A tokenizer gives ids, not places in the text. So an answer begins at the first id in which the text up to the
    answer, encoded alone, differs from the whole; an id that holds the end of the question too is the answer's.
    """
    cuts = [(number, cut) for number, each in enumerate(texts) for span in each.answers for cut in span]
    prefixes = tokenizer.encode_flat([texts[number].text[:cut] for number, cut in cuts])
    places = []
    for index, (number, cut) in enumerate(cuts):
        whole = encoded.ids[encoded.offsets[number] : encoded.offsets[number + 1]]
        part = prefixes.ids[prefixes.offsets[index] : prefixes.offsets[index + 1]]
        at = len(whole) if cut == len(texts[number].text) else _shared(whole, part)
        places.append(int(encoded.offsets[number]) + at)
    marks = np.zeros(len(encoded.ids), np.uint8)
    for start, stop in zip(places[::2], places[1::2], strict=True):
        marks[start:stop] = 1
    return marks


def _shared(whole: np.ndarray, part: np.ndarray) -> int:
    """How many ids both begin with."""
    length = min(len(whole), len(part))
    differing = np.flatnonzero(whole[:length] != part[:length])
    return int(differing[0]) if len(differing) else length
