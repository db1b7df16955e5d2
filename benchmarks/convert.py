"""`octo convert`, its proof of the weights included, against copying the same bytes, both ways; prints JSON.

    python benchmarks/convert.py --folder DISK --json
    python benchmarks/convert.py --folder DISK --shape 70b --layers 2

A model of Llama-3.1's shapes (random bf16 weights) goes from Hugging Face's format to ours and back, by `octo convert
from-hf` and `to-hf`, each with `--skip-logits` and a process of its own; the export must have the bytes that the road
began with. Before and after each conversion its input is copied on the same disk, file by file with fsync. What
is read is not in the page cache when a clock starts. `ratio_to_copy` is the time of a conversion, the start of Python
included, over the mean of the two copies around it; `seconds`, `copy_seconds` and it are medians of `--rounds`.

8B takes 50 GB of disk (input, result or copy, and room); where less is free the model has fewer layers, which stderr
and `fewer_layers_than_asked` say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform as machine
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from megatron_octo import lineage
from megatron_octo.config.load import load_recipe
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.convert import hf_folder
from megatron_octo.convert.safetensors_file import Named
from megatron_octo.model import mapping
from megatron_octo.platform.process import GIB, family_memory_gib, octo_command

RECIPE = Path(__file__).parent.parent / "recipes" / "llama31_8b.py"
LLAMA_8B = load_recipe(f"{RECIPE}:stable_200b", MidTrainConfig).model
SHAPES = {
    "8b": LLAMA_8B,
    "70b": replace(LLAMA_8B, hidden_size=8192, num_layers=80, num_heads=64, ffn_size=28_672, head_dim=128),
    "tiny": replace(
        LLAMA_8B, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=96, vocab_size=256, head_dim=16
    ),
}
DISK_BYTES_A_BYTE = 3
RANDOM_NUMBERS = (1 << 25) + 1  # tensors are made of them, one begins where the last ended
SAMPLE_EVERY_S = 0.25
HELD = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)
PACKAGES = ("torch", "safetensors")


def main() -> None:
    """Measure both ways and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; nothing is left in it")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="how many of the shape's")
    parser.add_argument("--rounds", type=int, default=1, help="conversions each way")
    parser.add_argument("--json", action="store_true", help="accepted; the output is JSON anyway")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        wanted = replace(SHAPES[asked.shape], num_layers=asked.layers or SHAPES[asked.shape].num_layers)
        model = that_fits(wanted, shutil.disk_usage(folder).free)
        hf, base, export = folder / "hf", folder / "base", folder / "export"
        write_model(hf, model)
        from_hf = measure(("from-hf", hf, base, "--skip-logits"), asked.rounds)
        for path in hf.glob(hf_folder.WEIGHT_FILES):
            path.unlink()
        to_hf = measure(("to-hf", base, export, "--tokenizer", hf, "--skip-logits"), asked.rounds)
        link = lineage.read(export)
    result = {
        "hardware": {"cores": os.cpu_count(), "processor": machine.processor() or machine.machine()},
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "shape": asked.shape,
        "layers": model.num_layers,
        "fewer_layers_than_asked": model != wanted,
        "bytes": hf_folder.num_bytes(model, "bf16"),
        "rounds": asked.rounds,
        "same_bytes": link.weights_sha256 == link.chain()[0].weights_sha256,
        "from_hf": from_hf,
        "to_hf": to_hf,
    }
    json.dump(result, sys.stdout, indent=2)


def that_fits(model: ModelConfig, free: int) -> ModelConfig:
    """The model, or as many of its layers as the free disk holds."""
    layers = model.num_layers
    while layers > 1 and DISK_BYTES_A_BYTE * hf_folder.num_bytes(replace(model, num_layers=layers), "bf16") > free:
        layers -= 1
    if layers < model.num_layers:
        print(f"{layers} layers instead of {model.num_layers}: {free / 1e9:.0f} GB are free", file=sys.stderr)
    return replace(model, num_layers=layers)


def write_model(folder: Path, model: ModelConfig) -> None:
    """A whole Hugging Face folder, with a tokenizer of a few words."""
    import tokenizers

    folder.mkdir()
    hf_folder.write_weights(folder, tensors(model), "bf16")
    vocabulary = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizers.Tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "config.json").write_text(json.dumps(mapping.hf_config(model, dtype="bfloat16")))


def tensors(model: ModelConfig) -> Iterator[list[Named]]:
    """Random weights, cheaply."""
    import torch

    numbers = torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    used = 0

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal used
        length = torch.Size(shape).numel()
        start, used = used % RANDOM_NUMBERS, used + length
        return numbers.repeat(2 + length // RANDOM_NUMBERS)[start : start + length].view(shape)

    for weight in mapping.weights(model):
        yield [Named(name=name, shape=shape, make=partial(make, shape)) for name, shape in weight.parts]


def measure(command: Sequence[object], rounds: int) -> dict[str, Any]:
    """`octo convert` with `command`, (which way, input, output, ...), and copies of its input around it."""
    _, source, output, *_ = map(Path, map(str, command))
    copies, conversions = [copy(source)], []
    for _ in range(rounds):
        shutil.rmtree(output, ignore_errors=True)
        conversions.append(convert(command, source))
        copies.append(copy(source))
    around = [statistics.mean(copies[number : number + 2]) for number in range(rounds)]
    return {
        "seconds": round(statistics.median(each["seconds"] for each in conversions), 2),
        "cpu_seconds": round(statistics.median(each["cpu_seconds"] for each in conversions), 2),
        "copy_seconds": round(statistics.median(around), 2),
        "ratio_to_copy": round(
            statistics.median(x["seconds"] / y for x, y in zip(conversions, around, strict=True)), 3
        ),
        "peak_gib": round(max(each["peak_gib"] for each in conversions), 2),
        "peak_gib_with_mapped_files": round(max(each["peak_gib_with_mapped_files"] for each in conversions), 2),
        "all_seconds": [round(each["seconds"], 2) for each in conversions],
        "all_copy_seconds": [round(each, 2) for each in copies],
    }


def copy(source: Path) -> float:
    """Seconds to copy a folder to its side, to the disk."""
    target = source.with_name("copy")
    target.mkdir()
    forget(source)
    start = time.perf_counter()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(command: Sequence[object], source: Path) -> dict[str, float]:
    """Seconds and peak memory of one conversion."""
    forget(source)
    peak, peak_pss = 0.0, 0.0
    start, start_cpu = time.perf_counter(), children_cpu_seconds()
    process = subprocess.Popen(octo_command("convert", *map(str, command)), stdout=sys.stderr)
    while process.poll() is None:
        peak, peak_pss = max(peak, held_gib(process.pid)), max(peak_pss, family_memory_gib(process.pid))
        time.sleep(SAMPLE_EVERY_S)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"octo convert {command[0]} failed")
    cpu_seconds = children_cpu_seconds() - start_cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gib": peak,
        "peak_gib_with_mapped_files": peak_pss,
    }


def children_cpu_seconds() -> float:
    """Of all that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def held_gib(pid: int) -> float:
    """Private and shared memory of a process and its descendants now, GiB.

    Pages of mapped files are left out: they are the page cache, which a copy fills as well, and which the kernel takes
    back when it wants. What processes share counts once for each.
    """
    total = 0
    for each in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.Error, OSError):
            total += sum(map(int, HELD.findall(Path(f"/proc/{each.pid}/status").read_text())))
    return 1024 * total / GIB


def forget(folder: Path) -> None:
    """Finish what the disk has to do, and drop a folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
