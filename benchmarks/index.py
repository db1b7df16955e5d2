"""The sample index of 200B tokens in 200M documents, ours and megatron-core's own, in one run: prints JSON.

    python benchmarks/index.py
    python benchmarks/index.py --documents 5000000 --repeats 1

The documents are synthetic: seeded lengths of 1 to 1999 tokens; the .bin is a hole, and so are the .idx's offsets,
which no index is made from. Each build is a process of its own, with an empty cache; the sides take turns. `seconds`
is making the data set with its index, files written (and ours synced, and our loop compiled), imports left out.
`peak_bytes` is the most memory the process ever had, imports included. Medians of `--repeats` builds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.data.indexed import CODES, HEADER, MAGIC, VERSION

SEED = 1
LENGTHS = (1, 2000)  # the second is not one of them; 1,000 on average
PIECE = 10_000_000
SIDES = ("megatron", "ours")
PACKAGES = ("megatron-core", "numpy", "numba")


def main() -> None:
    """Build both indices, several times, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000_000, help="of 1,000 tokens on average")
    parser.add_argument("--seq-length", type=int, default=8192, help="tokens in a sample")
    parser.add_argument("--repeats", type=int, default=3, help="builds of each side")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile; 2 GB for 200M documents")
    parser.add_argument("--build", nargs=3, metavar=("SIDE", "PREFIX", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        side, prefix, tokens = options.build
        json.dump(_build(side, Path(prefix), int(tokens), options.seq_length), sys.stdout)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefix = Path(folder) / "shard"
        tokens = _write_shard(prefix, options.documents)
        builds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                builds[side].append(_build_in_process(side, prefix, tokens, options.seq_length))
    sides = {side: _median(each) for side, each in builds.items()}
    result = {
        "hardware": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "documents": options.documents,
        "tokens": tokens,
        "samples": builds["ours"][0]["samples"],
        "repeats": options.repeats,
        "ratio_time": round(sides["ours"]["seconds"] / sides["megatron"]["seconds"], 3),
        "same_order": len({each["sha256"] for side in SIDES for each in builds[side]}) == 1,
        **sides,
    }
    json.dump(result, sys.stdout, indent=2)


def _write_shard(prefix: Path, documents: int) -> int:
    """Write the .idx and a .bin without content; return the tokens."""
    random, tokens = np.random.default_rng(SEED), 0
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES["int32"], documents, documents + 1))
        for start in range(0, documents, PIECE):
            lengths = random.integers(*LENGTHS, min(PIECE, documents - start), dtype=np.int32)
            lengths.tofile(file)
            tokens += int(lengths.sum(dtype=np.int64))
        file.seek(16 * documents, os.SEEK_CUR)  # offsets, and all bounds but the last
        file.write(documents.to_bytes(8, "little"))
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(4 * tokens)
    return tokens


def _build_in_process(side: str, prefix: Path, tokens: int, seq_length: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--seq-length", str(seq_length), "--build", side, str(prefix), str(tokens)]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    print(side, json.dumps(result), file=sys.stderr)
    return result


def _build(side: str, prefix: Path, tokens: int, seq_length: int) -> dict[str, Any]:
    """Make the data set as megatron's builder does; what it took, and the hash of its three arrays."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    from megatron_octo.data.dataset import packed_dataset_class

    class Tokenizer:
        vocab_size, eod, pad = 100_000, 0, -1
        unique_identifiers = {"name": "none"}  # noqa: RUF012

    with tempfile.TemporaryDirectory(dir=prefix.parent) as cache:
        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=seq_length,
            blend=([str(prefix)], None),
            split="1,0,0",
            tokenizer=Tokenizer(),
            path_to_cache=cache,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        kind = {"ours": packed_dataset_class(), "megatron": GPTDataset}[side]
        shard = kind.build_low_level_dataset(str(prefix), config)
        documents = np.arange(kind.numel_low_level_dataset(shard), dtype=np.int32)
        start, start_cpu = time.perf_counter(), time.process_time()
        dataset = kind(shard, str(prefix), documents, (tokens - 1) // seq_length, Split.train, config)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        peak_bytes = _peak_bytes()
        digest = hashlib.sha256()
        for array in (dataset.document_index, dataset.sample_index, dataset.shuffle_index):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array.data)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_bytes": peak_bytes,
        "samples": len(dataset),
        "sha256": digest.hexdigest(),
    }


def _peak_bytes() -> int:
    """Of this process since it started; getrusage's would begin with its parent's."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "no VmHWM in /proc/self/status: this runs on Linux"
    return 1024 * int(found[1])


def _median(builds: list[dict[str, Any]]) -> dict[str, Any]:
    result = {key: statistics.median(each[key] for each in builds) for key in ("seconds", "cpu_seconds", "peak_bytes")}
    return {**result, "peak_gib": round(result["peak_bytes"] / 2**30, 2), "all_seconds": [x["seconds"] for x in builds]}


if __name__ == "__main__":
    main()
