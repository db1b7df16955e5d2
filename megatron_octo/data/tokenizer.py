"""Tokenizer folders: train one with SentencePiece, load any to turn text into ids.

A folder is Hugging Face style, so transformers, vLLM and OpenRLHF load the same one. What encodes here
is what encodes there: tokenizer.json by the tokenizers library, else tokenizer.model by SentencePiece.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import console
from megatron_octo.config.base import to_dict
from megatron_octo.config.data import TokenizerConfig
from megatron_octo.data.manifest import tokenizer_sha256
from megatron_octo.data.read import check_input, read_records
from megatron_octo.data.templates import render
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.rundir import is_written, new_folder, read_json, write_json

if TYPE_CHECKING:
    import tokenizers

CONTROLS = UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"  # ids 0, 1, 2, 3
NEWLINE = "\n"  # a piece of its own that merges with nothing: a prompt that ends with it is a prefix in tokens too
SPACE = "\u2581"  # SentencePiece's spelling of a space; the character itself decodes to a space


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Text to ids and back. Text is data: a literal `</s>` in it never becomes a control id."""

    encode_batch: Callable[[Sequence[str]], list[list[int]]]
    """The ids of each text, no control ids added."""
    decode: Callable[[Sequence[int]], str]
    """The text of some ids; tokenizer.json spells control ids out."""
    vocab_size: int
    """The highest id plus one."""
    bos_id: int | None
    """Begins a document; None if the tokenizer has none."""
    eos_id: int | None
    """Ends a document; None if the tokenizer has none."""
    sha256: str
    """`manifest.tokenizer_sha256` of the folder."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text, no control ids added."""
        return self.encode_batch([text])[0]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder.

    Raises:
        BadInput: `folder` holds neither tokenizer.json nor tokenizer.model.
    """
    sha256 = tokenizer_sha256(folder)
    settings = folder / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    if (folder / "tokenizer.json").is_file():
        return _load_json(folder / "tokenizer.json", config, sha256)
    return _load_model(folder / "tokenizer.model", sha256)


def train_tokenizer(config: TokenizerConfig) -> None:
    """Train a SentencePiece BPE tokenizer and write its folder; equal inputs give equal bytes.

    Digits are single, unknown characters fall back to bytes, text is taken as it is.

    Raises:
        BadInput: an input is missing, or the vocabulary cannot have the size asked for.
        VerificationError: the Hugging Face form encodes one of the texts otherwise than SentencePiece.
    """
    log, settings = console.logger(__name__), to_dict(config)
    if is_written(config.output, settings):
        log.info("tokenizer: skipped, %s is there", config.output)
        return
    texts = _training_texts(config)
    model = _train_bpe(texts, config)
    with new_folder(config.output) as folder:
        (folder / "tokenizer.model").write_bytes(model)
        _write_hugging_face(folder, model)
        write_json(folder / "config.json", settings)
        _verify(folder, model, texts)
    log.info(
        "tokenizer: %s, %s ids, learnt from %s documents", config.output, f"{config.vocab_size:,}", f"{len(texts):,}"
    )


def _write_hugging_face(folder: Path, model: bytes) -> None:
    """Write tokenizer.json and tokenizer_config.json of a SentencePiece BPE model that `train_tokenizer` made."""
    import tokenizers as hf

    pieces = _pieces(model)
    out = hf.Tokenizer(hf.models.BPE(pieces, _merges(pieces), unk_token=UNK, fuse_unk=True, byte_fallback=True))
    out.normalizer = hf.normalizers.Replace(" ", SPACE)
    out.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace(SPACE, " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    out.add_special_tokens([hf.AddedToken(token, normalized=False, special=True) for token in CONTROLS])
    out.add_tokens([hf.AddedToken(NEWLINE, normalized=False, special=False)])
    (folder / "tokenizer.json").write_text(out.to_str(pretty=True))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": UNK,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
        },
    )


def _training_texts(config: TokenizerConfig) -> list[str]:
    for each in config.inputs:
        check_input(each.input)
    texts: list[str] = []
    for each in config.inputs:
        rendered = (render(each.template, record) for record in read_records(each.input))
        found = list(itertools.islice((text for text in rendered if text), config.documents_per_input))
        if not found:
            raise BadInput(f"no record of {each.input} fits template {each.template}", fix="choose another template")
        texts += found
    return texts


def _train_bpe(texts: list[str], config: TokenizerConfig) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            user_defined_symbols=[NEWLINE],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise BadInput(
            f"no tokenizer of vocab_size {config.vocab_size:,} from these texts: {str(error).rpartition('] ')[2]}",
            fix="raise it above 261 plus the number of distinct characters, or lower it to what the texts offer",
        ) from error
    return model.getvalue()


def _lines(texts: list[str]) -> Iterator[str]:
    """The lines of all texts. A tab is a reserved mark of the trainer, which would skip the line."""
    for text in texts:
        yield from (part for part in re.split(r"[\n\t]", text) if part)


def _pieces(model: bytes) -> dict[str, int]:
    processor = _processor(model)
    return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}


def _processor(model: bytes, origin: str = "the trained model") -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise BadInput(
            f"{origin} is no SentencePiece model: {error}", fix="give a folder that has a tokenizer.json"
        ) from error


def _merges(pieces: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order in which SentencePiece prefers them.

    SentencePiece merges the neighbours whose union is the best piece, and learns better pieces first.
    """
    mergeable = pieces.keys() - {*CONTROLS, NEWLINE} - {f"<0x{byte:02X}>" for byte in range(256)}
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(mergeable, key=pieces.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]


def _verify(folder: Path, model: bytes, texts: list[str]) -> None:
    """Raise VerificationError unless both forms give the same ids and the ids give the text back."""
    processor, tokenizer = _processor(model), load_tokenizer(folder)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if ids != processor.encode(text) or tokenizer.decode(ids) != text.replace(SPACE, " "):
            raise VerificationError(
                f"tokenizer.json and tokenizer.model disagree on {text[:80]!r}",
                fix="report this text: the folder was not written",
            )


def _load_json(path: Path, config: dict[str, Any], sha256: str) -> Tokenizer:
    import tokenizers as hf

    tokenizer = hf.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # literal control tokens in a text are text

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return Tokenizer(
        encode_batch=encode_batch,
        decode=decode,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=_control_id(tokenizer, config.get("bos_token")),
        eos_id=_control_id(tokenizer, config.get("eos_token")),
        sha256=sha256,
    )


def _control_id(tokenizer: tokenizers.Tokenizer, token: Any) -> int | None:
    """The id of a token that tokenizer_config.json names as a string or as {"content": string}."""
    name = token.get("content") if isinstance(token, dict) else token
    return None if name is None else tokenizer.token_to_id(name)


def _load_model(path: Path, sha256: str) -> Tokenizer:
    processor = _processor(path.read_bytes(), str(path))

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = processor.encode(list(texts), num_threads=os.cpu_count() or 1)
        return ids

    return Tokenizer(
        encode_batch=encode_batch,
        decode=lambda ids: str(processor.decode(list(ids))),
        vocab_size=processor.get_piece_size(),
        bos_id=processor.bos_id() if processor.bos_id() >= 0 else None,
        eos_id=processor.eos_id() if processor.eos_id() >= 0 else None,
        sha256=sha256,
    )
