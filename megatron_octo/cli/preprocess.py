"""`tools/preprocess_data.py`: `octo data prepare` under the flags of Megatron's own tool, with its file names."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_octo import console
from megatron_octo.config.data import PrepareConfig
from megatron_octo.errors import OctoError

TOKENIZERS = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "TikTokenizer")
ONE_SHARD = 1 << 62


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code (0 done, 1 failed, 2 bad input)."""
    options = argparse.ArgumentParser(description="JSON lines to Megatron's indexed data sets.", allow_abbrev=False)
    options.add_argument("--input", type=Path, required=True, help="a file or a pattern")
    options.add_argument("--json-keys", nargs="+", default=["text"], help="one data set a key")
    options.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX_KEY_document.bin and .idx")
    options.add_argument(
        "--tokenizer-type", choices=TOKENIZERS, default=TOKENIZERS[0], help="seen from the file anyway"
    )
    options.add_argument("--tokenizer-model", type=Path, required=True, help="a tokenizer's folder or file")
    options.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text id")
    options.add_argument("--workers", type=int, default=1, help="processes that encode")
    own = options.parse_args(argv)
    console.configure()
    try:
        for key in own.json_keys:
            _preprocess(own, key)
    except OctoError as error:
        console.logger(__name__).error("preprocess_data: %s", error)
        return error.exit_code
    return 0


def _preprocess(own: argparse.Namespace, key: str) -> None:
    from megatron_octo.data.prepare import prepare

    prefix = own.output_prefix.with_name(f"{own.output_prefix.name}_{key}_document")
    work = prefix.with_name(f"{prefix.name}.work")
    config = PrepareConfig(
        name=key,
        input=own.input,
        template="text",
        columns=(("text", key),),
        tokenizer=own.tokenizer_model,
        output=work,
        bos=False,
        eos=own.append_eod,
        shard_tokens=ONE_SHARD,
    )
    rubbish = work.with_name(f"{work.name}.rubbish")
    shutil.rmtree(rubbish, ignore_errors=True)
    manifest = prepare(config, num_workers=own.workers)
    for ending in (".bin", ".idx"):  # linked, not moved: killed between the two, a rerun finds both
        target = prefix.with_name(f"{prefix.name}{ending}")
        target.unlink(missing_ok=True)
        os.link(work / f"{manifest.shards[0].prefix}{ending}", target)
    work.replace(rubbish)  # whole or gone
    shutil.rmtree(rubbish)
