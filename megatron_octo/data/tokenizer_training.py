"""A SentencePiece tokenizer learnt from corpora and written as a Hugging Face folder, in two forms that agree."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_octo import console
from megatron_octo.config.base import to_dict
from megatron_octo.config.data import TokenizerConfig
from megatron_octo.data.read import check_input, read_records
from megatron_octo.data.templates import BadRecord, Render, Rendered, renderer
from megatron_octo.data.tokenizer import load_tokenizer, sentencepiece_processor
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.rundir import is_written, new_folder, write_json

CONTROLS = UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"  # ids 0, 1, 2, 3
NEWLINE = "\n"  # a piece of its own that merges with nothing: a prompt that ends with it is a prefix in tokens too
SPACE = "\u2581"  # SentencePiece's spelling of a space; the character itself decodes to a space


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
        rendered = _rendered(each.input, renderer(each.template))
        found = [each.text for each in itertools.islice(rendered, config.documents_per_input)]
        if not found:
            raise BadInput(f"no record of {each.input} fits template {each.template}", fix="choose another template")
        texts += found
    return texts


def _rendered(path: Path, render: Render) -> Iterator[Rendered]:
    """The texts of the records that fit."""
    for record in read_records(path):
        with contextlib.suppress(BadRecord):
            if rendered := render(record):
                yield rendered


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
    processor = sentencepiece_processor(model)
    return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}


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
    processor, tokenizer = sentencepiece_processor(model), load_tokenizer(folder)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if ids != processor.encode(text) or tokenizer.decode(ids) != text.replace(SPACE, " "):
            raise VerificationError(
                f"tokenizer.json and tokenizer.model disagree on {text[:80]!r}",
                fix="report this text: the folder was not written",
            )
