"""`tools/preprocess_data.py`: `octo data prepare` under the flags of Megatron's own tool, with its files."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_octo import console
from megatron_octo.cli.options import Parser, at_least_one
from megatron_octo.config.data import PrepareConfig
from megatron_octo.errors import BadInput, OctoError

ABOUT = """JSON lines to the files of Megatron-LM's tools/preprocess_data.py, PREFIX_KEY_document.bin and .idx.

They are byte for byte Megatron's, with the beginning-of-text id that its HuggingFaceTokenizer puts before each document
where the tokenizer's post-processor does. One thing differs on purpose: text that spells a control token, such as
<|end_of_text|>, is encoded as ordinary text and counted in a line at the end; Megatron makes the control id of it."""
HUGGING_FACE = "HuggingFaceTokenizer"
FILES = {
    HUGGING_FACE: "tokenizer.json",
    "SentencePieceTokenizer": "tokenizer.model",
    "GPTSentencePieceTokenizer": "tokenizer.model",
    "Llama2Tokenizer": "tokenizer.model",
    "TikTokenizer": "tokenizer.model",
}
AS_JSON = (
    "save it as a tokenizer.json: transformers.AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER); then "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER"
)
REFUSED = {
    "--split-sentences": "split them beforehand: one sequence is one document here",
    "--find-optimal-num-workers": "leave it out; `--workers` is at best the number of cores",
    "--vocab-file": AS_JSON,
    "--merge-file": AS_JSON,
}
ONE_SHARD = 1 << 62

log = console.logger(__name__)


class Around(NamedTuple):
    """What Megatron puts around a document."""

    bos: str | None
    eos: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code (0 done, 1 failed, 2 bad input)."""
    console.configure()
    try:
        own = _options().parse_args(argv)
        _check(own)
        tokenizer = _tokenizer_file(own)
        around = _around(own, tokenizer)
        for key in own.json_keys:
            _preprocess(own, key, tokenizer, around)
    except OctoError as error:
        log.error("preprocess_data: %s", error)
        return error.exit_code
    return 0


def _options() -> argparse.ArgumentParser:
    out = Parser(prog="preprocess_data.py", description=ABOUT)
    out.add_argument("--input", type=Path, required=True, help="a file or a pattern")
    out.add_argument("--json-keys", nargs="+", default=["text"], help="one data set a key")
    out.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX_KEY_document.bin and .idx")
    out.add_argument("--tokenizer-type", default=HUGGING_FACE, help=f"{', '.join(FILES)} (Llama-3's file)")
    out.add_argument("--tokenizer-model", type=Path, required=True, help="a tokenizer's folder or file")
    out.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text id")
    bare = "put nothing before a document, whatever the post-processor does"
    out.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true", help=bare)
    out.add_argument("--workers", type=at_least_one, default=1, help="processes that encode")
    out.add_argument("--partitions", type=at_least_one, default=1, help="changes nothing: --workers share one file")
    ordered = "always so; to be given with --partitions, whose documents Megatron else deals out in turn"
    out.add_argument("--keep-sequential-samples", action="store_true", help=ordered)
    out.add_argument("--log-interval", help="changes nothing: progress is shown by the clock")
    out.add_argument("--lang", help="changes nothing, as in Megatron's tool without --split-sentences")
    out.add_argument("--keep-newlines", action="store_true", help="likewise")
    for flag in REFUSED:
        out.add_argument(flag, nargs="?", const="", help=argparse.SUPPRESS)
    return out


def _check(own: argparse.Namespace) -> None:
    """Refuse what this tool does not do.

    Raises:
        BadInput: a flag asks for it.
    """
    for flag, fix in REFUSED.items():
        if getattr(own, flag.strip("-").replace("-", "_")) is not None:
            raise BadInput(f"{flag} is not supported", fix=fix)
    if own.tokenizer_type not in FILES:
        raise BadInput(f"--tokenizer-type {own.tokenizer_type} is not among {', '.join(FILES)}", fix=AS_JSON)
    if own.partitions > 1 and not own.keep_sequential_samples:
        raise BadInput(
            f"--partitions {own.partitions}: Megatron's tool would change the documents' order, this one keeps it",
            fix="leave it out, or add --keep-sequential-samples; --workers is enough for speed",
        )


def _preprocess(own: argparse.Namespace, key: str, tokenizer: Path, around: Around) -> None:
    from megatron_octo.data.prepare import prepare

    prefix = own.output_prefix.with_name(f"{own.output_prefix.name}_{key}_document")
    work = prefix.with_name(f"{prefix.name}.work")
    config = PrepareConfig(
        name=key,
        input=own.input,
        template="text",
        columns=(("text", key),),
        tokenizer=tokenizer,
        output=work,
        bos=around.bos is not None,
        bos_token=around.bos,
        eos=own.append_eod,
        eos_token=around.eos,
        shard_tokens=ONE_SHARD,
    )
    rubbish = work.with_name(f"{work.name}.rubbish")
    shutil.rmtree(rubbish, ignore_errors=True)
    manifest = prepare(config, num_workers=own.workers, keep_empty=True)
    for ending in (".bin", ".idx"):  # linked, not moved: killed between the two, a rerun finds both
        target = prefix.with_name(f"{prefix.name}{ending}")
        target.unlink(missing_ok=True)
        os.link(work / f"{manifest.shards[0].prefix}{ending}", target)
    work.replace(rubbish)  # whole or gone
    shutil.rmtree(rubbish)
    if manifest.control_texts:
        found = ", ".join(f"{count:,} x {spelt}" for spelt, count in manifest.control_texts)
        log.warning("%s: control tokens that the texts spell are ordinary text here: %s", prefix.name, found)


def _tokenizer_file(own: argparse.Namespace) -> Path:
    """The file that encodes.

    Raises:
        BadInput: it is not there, or not of the kind that --tokenizer-type says.
    """
    name = FILES[own.tokenizer_type]
    file: Path = own.tokenizer_model / name if own.tokenizer_model.is_dir() else own.tokenizer_model
    if not file.is_file() or (file.suffix == ".json") != (own.tokenizer_type == HUGGING_FACE):
        raise BadInput(
            f"--tokenizer-type {own.tokenizer_type} reads a {name}; {file} is none",
            fix="give such a file or its folder as --tokenizer-model, or another --tokenizer-type",
        )
    return file


def _around(own: argparse.Namespace, file: Path) -> Around:
    """What Megatron puts around a document: its HuggingFaceTokenizer is transformers' for the folder, which is asked.

    Raises:
        BadInput: transformers does not load the folder, or puts more around a text than one token before it.
    """
    if own.tokenizer_type != HUGGING_FACE:
        return Around(bos=None, eos=None)  # a SentencePiece model's own end
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(file.parent)
    except Exception as error:  # it raises whatever its parts raise
        raise BadInput(f"transformers loads no tokenizer from {file.parent}: {error}", fix="complete it") from error
    text = theirs("a", add_special_tokens=False).input_ids
    whole = text if own.tokenizer_hf_no_include_special_tokens else theirs("a").input_ids
    before = whole[: len(whole) - len(text)]
    if len(before) > 1 or before + text != whole:
        raise BadInput(
            f"the tokenizer in {file.parent} makes {theirs.convert_ids_to_tokens(whole)} of 'a': more than one token "
            "before the text",
            fix="leave such tokens out: --tokenizer-hf-no-include-special-tokens",
        )
    _compare(theirs, file)
    return Around(
        bos=theirs.convert_ids_to_tokens(before)[0] if before else None, eos=theirs.eos_token or theirs.sep_token
    )


def _compare(theirs: Any, file: Path) -> None:
    """Say where transformers makes other ids of a folder than its tokenizer.json does."""
    from megatron_octo.data.tokenizer import TRAPS, load_tokenizer

    ours = load_tokenizer(file)
    for text in TRAPS:
        if theirs(text, add_special_tokens=False).input_ids != ours.encode(text):
            kind = type(theirs).__name__
            log.warning("Megatron's files will differ: transformers' %s is not what %s says: %r", kind, file, text[:40])
            return
