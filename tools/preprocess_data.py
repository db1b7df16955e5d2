"""JSON lines -> Megatron's PREFIX_KEY_document.bin/.idx, with the flags that Megatron users know.

    python tools/preprocess_data.py --input web.jsonl --output-prefix data/web --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model FOLDER --append-eod --workers 8

`octo data prepare` does more: manifests, shards, templates, held-out documents.
"""

from megatron_octo.cli.preprocess import main

if __name__ == "__main__":
    raise SystemExit(main())
