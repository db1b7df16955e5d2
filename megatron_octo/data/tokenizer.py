"""Text to ids: Hugging Face's tokenizer.json, a SentencePiece model, or Llama-3's tiktoken file.

Text is data: what spells a control token is encoded as ordinary text, as tiktoken's `encode_ordinary` does. For that
the control tokens bear other names in the vocabulary that text is matched against. Control tokens are

* of a tokenizer.json: the added tokens with `special`;
* of a SentencePiece model: its control pieces, its unknown piece, and user-defined pieces that are spelt `<|...|>`;
* of both: what tokenizer_config.json lists as special, and the tokens that begin and end documents.

Other added tokens and user-defined pieces (`<think>`, a digit, a run of spaces) are there for text, which becomes them.

`accelerated` puts gigatoken in place of the tokenizer's own library where both give the same ids.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_octo import console
from megatron_octo.data.manifest import (
    document_tokens,
    spelling,
    tokenizer_config,
    tokenizer_file,
    tokenizer_sha256,
)
from megatron_octo.errors import BadInput
from megatron_octo.rundir import read_json

if TYPE_CHECKING:
    import tokenizers

UNHEARD = "\ufffe\uffff"
"""Ends the names of control tokens where text must not become them: no characters, so no text has them."""

# Llama 3: Meta's models/llama3/tokenizer.py, which the file itself does not state
LLAMA3_RANKS = 128_000
LLAMA3_CONTROLS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAPS = (
    "",
    " ",
    "\n\n \n",
    "\t\ta  b   c    d ",
    "a\r\nb\rc\u2028d\u00a0e\u3000f",
    "caf\u00e9 cafe\u0301 \u4e2d\u6587\u5b57 \u0395\u03bb \u0627\u0644 \U0001f600\U0001f468\u200d\U0001f469",
    "\ufeff a\x00b\x7f\u200b",
    "I'm, you'LL, 'tis; 0 12 345 6789 3.14e-10 1,000,000 \u0663\u0664",
    "def f(x):\n    return x**2  # comment\n\n\n\tx += 1\n",
    "a" * 3000 + " " * 300 + "\n" * 300 + "-=" * 500,
    r"\boxed{\frac{1}{2}} $x^2_{i+1}$ <think>\n</think> &amp; <b>",
    "\u2581a \u2581\u2581b <0x0A> <0xE2>",
)
"""Texts on which tokenizers are known to differ."""


class Encoded(NamedTuple):
    """The ids of some texts, one after the other."""

    ids: np.ndarray
    """uint32 [tokens]"""
    offsets: np.ndarray
    """int64 [texts + 1]: where each text begins, and the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Text to ids and back. A literal `</s>` in a text never becomes a control id."""

    encode_flat: Callable[[Sequence[str]], Encoded]
    """The ids of each text, no control ids added."""
    decode: Callable[[Sequence[int]], str]
    """The text of some ids; tokenizer.json spells control ids out."""
    vocab_size: int
    """The highest id plus one."""
    bos_token: str | None
    """Begins a document; None if the tokenizer has none."""
    bos_id: int | None
    """Its id."""
    eos_token: str | None
    """Ends a document; None if the tokenizer has none."""
    eos_id: int | None
    """Its id."""
    controls: tuple[str, ...]
    """How its control tokens are spelt."""
    sha256: str
    """`manifest.tokenizer_sha256`."""
    engine: str
    """The library that ordinary."""
    fast: Callable[[], Any]
    """Makes the same tokenizer of gigatoken's; may fail in any way."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, no control ids added."""
        ids, offsets = self.encode_flat(texts)
        return [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]

    def encode(self, text: str) -> list[int]:
        """The ids of one text, no control ids added."""
        return self.encode_batch([text])[0]


def load_tokenizer(path: Path, *, bos_token: str | None = None, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer in a Hugging Face folder, or in one of the files that such a folder holds.

    Args:
        bos_token: spelling of the token that begins documents; None for the tokenizer's own.
        eos_token: spelling of the token that ends documents; None for the tokenizer's own.

    Raises:
        BadInput: `path` is neither, or the file is of a kind that is not known.
    """
    sha256, file = tokenizer_sha256(path), tokenizer_file(path)
    num_ranks = None if file.suffix == ".json" else _tiktoken_ranks(file)
    if num_ranks not in (None, LLAMA3_RANKS):
        raise BadInput(
            f"{file} is a tiktoken file of {num_ranks:,} ranks, which does not say how text is split",
            fix=f"give that model's tokenizer.json; of tiktoken files, Llama-3's ({LLAMA3_RANKS:,} ranks) is known",
        )
    bos, eos = LLAMA3_CONTROLS[:2] if num_ranks else document_tokens(path)
    stated = _Stated(bos=bos_token or bos, eos=eos_token or eos, special=_special(tokenizer_config(path)))
    if num_ranks:
        return _of_json(_llama3(file), stated, sha256)
    if file.suffix == ".json":
        return _of_json(_read_json_tokenizer(file), stated, sha256)
    return _of_sentencepiece(file, stated, sha256)


def check_vocabulary(model: Path) -> None:
    """Refuse a Hugging Face folder whose tokenizer has more ids than its model has rows.

    Raises:
        BadInput: so it is, or it holds no tokenizer.
    """
    rows, size = read_json(model / "config.json").get("vocab_size", 0), load_tokenizer(model).vocab_size
    if size > rows:
        raise BadInput(
            f"the tokenizer in {model} has {size:,} ids, but the model has {rows:,} rows (vocab_size)",
            fix="put the model's own tokenizer into the folder, or export the model again",
        )


def accelerated(tokenizer: Tokenizer, sample: Sequence[str]) -> Tokenizer:
    """The same tokenizer on gigatoken if that gives the same ids for `sample`, control tokens and known traps.

    A line says which it is.
    """
    log = console.logger(__name__)
    texts = [*sample, *TRAPS, *(f"a {control}\n{control}b" for control in tokenizer.controls)]
    try:
        fast = replace(tokenizer, encode_flat=_gigatoken(tokenizer.fast()), engine="gigatoken")
        differing = _first_difference(tokenizer, fast, texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        log.info("tokenizer: %s encodes; gigatoken does not take this one (%s)", tokenizer.engine, type(error).__name__)
        return tokenizer
    if differing is not None:
        log.info("tokenizer: %s encodes; gigatoken differs on %r", tokenizer.engine, differing[:40])
        return tokenizer
    log.info("tokenizer: gigatoken encodes; it agrees with %s on %s texts", tokenizer.engine, f"{len(texts):,}")
    return fast


def sentencepiece_processor(model: bytes, origin: str = "the trained model") -> Any:
    """A SentencePiece model, loaded.

    Raises:
        BadInput: `model` is none; the message names its `origin`.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise BadInput(
            f"{origin} is no SentencePiece model: {error}", fix="give a folder that has a tokenizer.json"
        ) from error


def _first_difference(one: Tokenizer, other: Tokenizer, texts: Sequence[str]) -> str | None:
    pairs = zip(texts, one.encode_batch(texts), other.encode_batch(texts), strict=True)
    return next((text for text, ids, others in pairs if ids != others), None)


def _gigatoken(fast: Any) -> Callable[[Sequence[str]], Encoded]:
    def encode_flat(texts: Sequence[str]) -> Encoded:
        layout = fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        return Encoded(np.asarray(layout.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0])

    return encode_flat


def _flat(batch: Sequence[Sequence[int]]) -> Encoded:
    offsets = np.zeros(len(batch) + 1, np.int64)
    np.cumsum([len(ids) for ids in batch], out=offsets[1:])
    ids = np.fromiter((index for ids in batch for index in ids), np.uint32, count=int(offsets[-1]))
    return Encoded(ids, offsets)


def _read_json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    import tokenizers as hf

    try:
        return hf.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BadInput(f"{path} is no tokenizer: {error}", fix="give a whole tokenizer.json") from error


class _Stated(NamedTuple):
    """What is known of a tokenizer's tokens besides the file that ordinary."""

    bos: str | None
    """Begins documents; None for a SentencePiece model's own."""
    eos: str | None
    """Ends documents; None for a SentencePiece model's own."""
    special: frozenset[str]
    """Control tokens, whatever the file says of them."""


def _special(config: dict[str, Any]) -> frozenset[str]:
    """The tokens that tokenizer_config.json lists as special."""
    listed = [token for token in (config.get("added_tokens_decoder") or {}).values() if token.get("special")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or ()
        listed += tokens.values() if isinstance(tokens, dict) else tokens
    return frozenset(name for name in map(spelling, listed) if name)


def _of_json(tokenizer: tokenizers.Tokenizer, stated: _Stated, sha256: str) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    controls = _controls(ids, special, stated)
    ordinary = _without(tokenizer, controls, special)

    def encode_flat(texts: Sequence[str]) -> Encoded:
        return _flat([each.ids for each in ordinary.encode_batch_fast(list(texts), add_special_tokens=False)])

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    def fast() -> Any:
        import gigatoken

        definition = json.loads(ordinary.to_str())
        definition["added_tokens"] = [token for token in definition["added_tokens"] if not token["special"]]
        definition["post_processor"] = None
        return gigatoken.Tokenizer.from_json(json.dumps(definition))

    bos_token, bos_id = _token_and_id(ids, stated.bos)
    eos_token, eos_id = _token_and_id(ids, stated.eos)
    return Tokenizer(
        encode_flat=encode_flat,
        decode=decode,
        vocab_size=max(ids.values()) + 1,
        bos_token=bos_token,
        bos_id=bos_id,
        eos_token=eos_token,
        eos_id=eos_id,
        controls=controls,
        sha256=sha256,
        engine="tokenizers",
        fast=fast,
    )


def _without(tokenizer: tokenizers.Tokenizer, controls: Sequence[str], special: set[str]) -> tokenizers.Tokenizer:
    """The same tokenizer, but no text becomes one of `controls`."""
    import tokenizers as hf

    if special.issuperset(controls) and tokenizer.get_vocab(with_added_tokens=False).keys().isdisjoint(controls):
        tokenizer.encode_special_tokens = True  # they are added tokens and nothing else: this alone makes them text
        return tokenizer
    names = {control: f"{control}{UNHEARD}" for control in controls}
    definition = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], special=True)
    model, vocab = definition["model"], definition["model"]["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocab.items()}
    else:  # a Unigram's pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint({*pair, "".join(pair)})]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    definition["post_processor"] = None  # it knows the old names
    out = hf.Tokenizer.from_str(json.dumps(definition))
    out.encode_special_tokens = True
    return out


def _of_sentencepiece(path: Path, stated: _Stated, sha256: str) -> Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    data = path.read_bytes()
    processor = sentencepiece_processor(data, str(path))
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    own_bos, own_eos = (
        processor.id_to_piece(index) if index >= 0 else None for index in (processor.bos_id(), processor.eos_id())
    )
    stated = stated._replace(bos=stated.bos or own_bos, eos=stated.eos or own_eos)
    special = {piece.piece for piece in model.pieces if _is_control(piece)}
    controls = _controls(ids, special, stated)
    for piece in model.pieces:
        if piece.piece in controls and piece.type != piece.UNKNOWN:  # no text becomes an unknown piece
            piece.type = piece.CONTROL
            piece.piece += UNHEARD  # gigatoken goes by the name
    hidden = model.SerializeToString()
    ordinary = sentencepiece_processor(hidden, str(path))

    def encode_flat(texts: Sequence[str]) -> Encoded:
        return _flat(ordinary.encode(list(texts), num_threads=1))

    def fast() -> Any:
        import gigatoken

        return gigatoken.Tokenizer.from_sentencepiece(hidden)

    bos_token, bos_id = _token_and_id(ids, stated.bos)
    eos_token, eos_id = _token_and_id(ids, stated.eos)
    return Tokenizer(
        encode_flat=encode_flat,
        decode=lambda ids: str(processor.decode(list(ids))),
        vocab_size=len(ids),
        bos_token=bos_token,
        bos_id=bos_id,
        eos_token=eos_token,
        eos_id=eos_id,
        controls=controls,
        sha256=sha256,
        engine="sentencepiece",
        fast=fast,
    )


def _is_control(piece: Any) -> bool:
    """Whether a SentencePiece model's piece is a control token: by its kind; or by its name, if a user defined it."""
    named = piece.piece.startswith("<|") and piece.piece.endswith("|>")
    return piece.type in (piece.CONTROL, piece.UNKNOWN) or (piece.type == piece.USER_DEFINED and named)


def _controls(ids: dict[str, int], special: set[str], stated: _Stated) -> tuple[str, ...]:
    """How the control tokens are spelt, in the order of their ids."""
    names = special | stated.special | {stated.bos, stated.eos}
    return tuple(sorted(ids.keys() & names, key=ids.__getitem__))


def _token_and_id(ids: dict[str, int], token: str | None) -> tuple[str | None, int | None]:
    """A token and its id, if there is one."""
    return (token, ids[token]) if token in ids else (None, None)


def _tiktoken_ranks(path: Path) -> int | None:
    """How many ranks a tiktoken file holds (a line each: a token in base64, its rank); None for another file."""
    with path.open("rb") as file:
        try:
            token, rank = file.readline(4096).split()
            base64.b64decode(token, validate=True)
            int(rank)
        except (ValueError, binascii.Error):
            return None
        return 1 + sum(1 for line in file if line.strip())


def _llama3(path: Path) -> tokenizers.Tokenizer:
    """Llama-3's tiktoken file as Hugging Face's tokenizer."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(str(path), pattern=LLAMA3_SPLIT, extra_special_tokens=list(LLAMA3_CONTROLS))
    converted: tokenizers.Tokenizer = converter.converted()
    return converted
