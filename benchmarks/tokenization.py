"""`octo data prepare` against Megatron's classic way: tokens a second end to end, and memory on a large file.

    python benchmarks/tokenization.py --text stable/*.jsonl.gz --tokenizer LLAMA3_FOLDER --workers 2 --json

The classic way is that of Megatron's preprocess_data.py: a pool of processes, Hugging Face's tokenizers document by
document, megatron-core's IndexedDatasetBuilder. Both read the same file of JSON lines, made of the texts given,
repeated to `--sample-mb`; ours then reads one of `--large-mb`, in records of `--record-mb`, and its memory (the sum of
the proportional set sizes of all its processes) is sampled. Both sides must write the same ids. The last line's
`ratio` is ours over theirs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.read import input_files, read_records
from megatron_octo.platform.process import family_memory_gib

PACKAGES = ("gigatoken", "tokenizers", "megatron-core")
SAMPLE_EVERY_S = 0.1
MB = 10**6


def main() -> None:
    """Measure both sides and print JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text", type=Path, nargs="+", required=True, help="JSON lines with a `text` column")
    options.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer.json")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--sample-mb", type=int, default=200, help="text that both sides read")
    options.add_argument("--large-mb", type=int, default=2000, help="text on which memory is measured")
    options.add_argument(
        "--record-mb", type=float, default=0, help="at least, of that file; 0 leaves the texts as they are"
    )
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("--json", action="store_true", help="accepted; the output is JSON anyway")
    own = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = write_text(own.text, folder / "sample.jsonl", own.sample_mb * MB)
        ours, theirs = [], []
        for _ in range(own.repeats):
            ours.append(measure(lambda: prepare(sample, own.tokenizer, folder / "ours", own.workers)))
            theirs.append(measure(lambda: classic(sample, own.tokenizer, folder / "theirs", own.workers)))
        same = (folder / "ours" / "00000.bin").read_bytes() == (folder / "theirs.bin").read_bytes()
        large = write_text(own.text, folder / "large.jsonl", own.large_mb * MB, own.record_mb * MB)
        on_large = measure(lambda: prepare(large, own.tokenizer, folder / "large", own.workers))
        result = {
            "hardware": {"cores": os.cpu_count()},
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "workers": own.workers,
            "sample_bytes": sample.stat().st_size,
            "ours": median(ours),
            "classic": median(theirs),
            "same_bytes": same,
            "large": {**on_large, "bytes": large.stat().st_size},
            "ratio": round(median(ours)["tokens_per_second"] / median(theirs)["tokens_per_second"], 2),
            "peak_gib": on_large["peak_gib"],
        }
    json.dump(result, sys.stdout, indent=2)


def write_text(inputs: Sequence[Path], output: Path, size: int, record_bytes: float = 0) -> Path:
    """JSON lines of the texts, as many in one as have `record_bytes`, over and over until they have `size` bytes."""
    files = [file for path in inputs for file in input_files(path)]
    texts = itertools.cycle([record["text"] for file in files for record in read_records(file)])
    with output.open("wb") as out:
        while out.tell() < size:
            parts = [next(texts)]
            while sum(map(len, parts)) < record_bytes:
                parts.append(next(texts))
            out.write(json.dumps({"text": "\n".join(parts)}).encode() + b"\n")
    return output


def measure(run: Callable[[], int]) -> dict[str, float]:
    """Run in a process of its own; tokens a second of wall time, and the peak memory of it and its children."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=lambda: answers.put(run()))
    peak, over = [0.0], threading.Event()
    start = time.perf_counter()
    process.start()

    def watch() -> None:
        while not over.wait(SAMPLE_EVERY_S):
            peak[0] = max(peak[0], family_memory_gib(process.pid or 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    tokens = answers.get()
    process.join()
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    return {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "peak_gib": round(peak[0], 3),
    }


def prepare(text: Path, tokenizer: Path, output: Path, workers: int) -> int:
    """Our side; returns the tokens written."""
    import shutil

    from megatron_octo.data.prepare import prepare

    shutil.rmtree(output, ignore_errors=True)
    config = PrepareConfig(
        name="text", input=text, template="text", tokenizer=tokenizer, output=output, bos=False, shard_tokens=1 << 62
    )
    return prepare(config, num_workers=workers).tokens


def classic(text: Path, tokenizer: Path, output: Path, workers: int) -> int:
    """Their side; returns the tokens written."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    size = encoder_size(tokenizer)
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(size))
    tokens = 0
    with multiprocessing.get_context("fork").Pool(workers, initializer=start_encoder, initargs=(tokenizer,)) as pool:
        for ids in pool.imap(encode, lines(text), chunksize=32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{output}.idx")
    return tokens


def lines(path: Path) -> Iterator[str]:
    """The lines of a file."""
    with path.open() as file:
        yield from file


def encoder_size(folder: Path) -> int:
    """Ids of a tokenizer."""
    import tokenizers

    return int(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size())


_encoder: dict[str, Any] = {}  # a pool's processes have no other place


def start_encoder(folder: Path) -> None:
    """Load a pool process's tokenizer."""
    import tokenizers

    from megatron_octo.data.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder["tokenizer"] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    _encoder["eos"] = load_tokenizer(folder).eos_id


def encode(line: str) -> list[int]:
    """One document, as preprocess_data.py encodes it with --append-eod."""
    ids: list[int] = _encoder["tokenizer"].encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, _encoder["eos"]]


def median(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The run with the median speed."""
    middle = statistics.median_low([run["tokens_per_second"] for run in runs])
    return next(run for run in runs if run["tokens_per_second"] == middle)


if __name__ == "__main__":
    main()
