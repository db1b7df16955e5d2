"""What a training step costs on one CPU thread, ours against others' on the same shape; prints a table, or JSON.

    python benchmarks/train_step.py --json

Four sides, each a process of its own, take their steps in turn (A B C D A B C D ...), so that a busy machine is busy
for all; the numbers are medians of a process's CPU seconds from one fetch of data to the next:

    ours          `train()` as it is, from a prepared data set: loader, metrics and log included
    transformers  a plain loop: LlamaForCausalLM with sdpa, clip_grad_norm_, torch's AdamW; its batches are in memory
    pretrain      `megatron.training.pretrain` with its own local layers; its batches are in memory
    pretrain_our_attention  the same with our attention in its layers

`overhead_share` is what our loop adds around forward, backward and optimizer; `loader_times_step` how many times more
tokens a second the loader gives than the step eats.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform as machine
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_octo.config.data import MixtureConfig, PrepareConfig, SourceConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.schedule import ConstantRate
from megatron_octo.config.train import (
    BudgetConfig,
    FromScratch,
    MidTrainConfig,
    ParallelConfig,
    PrecisionConfig,
    SaveConfig,
)

SEQ_LENGTH = 256
SEQUENCES = 8
WARMUP_STEPS = 3
ENOUGH_STEPS = 1000
PEAK = 1e-3
MODEL = ModelConfig(
    hidden_size=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    ffn_size=768,
    vocab_size=2048,
    tied_embeddings=True,
    rope_theta=10_000.0,
    max_positions=SEQ_LENGTH,
)
PACKAGES = ("torch", "megatron-core", "transformers")
Connection = Any


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each side")
    parser.add_argument("--json", action="store_true", help="machine output")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the children when they import torch
    with tempfile.TemporaryDirectory() as name:
        config = prepare_stage(Path(name))
        os.environ["OCTO_RUNS"] = str(Path(name) / "runs")
        steps = measure({side: partial(run, config) for side, run in SIDES.items()}, asked.steps)
        loader = alone(partial(loader_tokens_per_second, config))
    result = summary(steps, loader)
    if asked.json:
        json.dump(result, sys.stdout, indent=2)
    else:
        print("\n".join(f"{key:40} {value}" for key, value in result.items()))


def summary(steps: dict[str, list[dict[str, float]]], loader: float) -> dict[str, Any]:
    """The medians and their ratios."""
    seconds = {side: statistics.median(step["seconds"] for step in taken) for side, taken in steps.items()}
    ours, overhead = seconds["ours"], statistics.median(step["overhead"] for step in steps["ours"])
    return {
        "hardware": {"cores": os.cpu_count(), "processor": machine.processor() or machine.machine()},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "parameters": MODEL.num_parameters,
        "tokens_a_step": SEQUENCES * SEQ_LENGTH,
        "steps": len(steps["ours"]),
        "median_cpu_seconds": {side: round(each, 4) for side, each in seconds.items()},
        "ratio_to_transformers": round(ours / seconds["transformers"], 3),
        "ratio_to_pretrain": round(ours / seconds["pretrain"], 3),
        "ratio_to_pretrain_with_our_attention": round(ours / seconds["pretrain_our_attention"], 3),
        "overhead_seconds": round(overhead, 5),
        "overhead_share": round(overhead / ours, 5),
        "loader_tokens_per_second": round(loader),
        "loader_times_step": round(loader * ours / (SEQUENCES * SEQ_LENGTH), 1),
    }


def measure(sides: dict[str, Callable[[Gate], None]], steps: int) -> dict[str, list[dict[str, float]]]:
    """Let every side take `steps` steps after the warm-up, one step at a time, in turn."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    processes, taken = [], {side: list[dict[str, float]]() for side in sides}
    for side, run in sides.items():
        ends[side], theirs = context.Pipe()
        process = context.Process(target=started, args=(run, theirs), daemon=True)
        process.start()
        theirs.close()  # then a child that dies ends our wait for it
        processes.append(process)
    for end in ends.values():
        end.recv()  # it stands before its first step
    for number in range(WARMUP_STEPS + steps):
        for side, end in ends.items():
            end.send(None)
            step = end.recv()
            if number >= WARMUP_STEPS:
                taken[side].append(step)
    for process in processes:
        process.kill()
    return taken


def alone(run: Callable[[], float]) -> float:
    """What a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run)


def started(run: Callable[[Gate], None], connection: Connection) -> None:
    """A side's process: what it prints goes to stderr."""
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    run(Gate(connection))


class Gate:
    """Stands before each step of a side: reports the step that ended and waits for the next turn."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._start: float | None = None
        self.work = 0.0
        """CPU seconds of this step's forward, backward and optimizer, where a side counts them."""

    def __call__(self) -> None:
        end = time.process_time()
        seconds = None if self._start is None else end - self._start
        self._connection.send(None if seconds is None else {"seconds": seconds, "overhead": seconds - self.work})
        self._connection.recv()
        self.work, self._start = 0.0, time.process_time()

    def counted(self, function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """The function, its CPU seconds added to `work`, or taken from it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.work += sign * (time.process_time() - start)

        return run


def ours(config: MidTrainConfig, gate: Gate) -> None:
    """The product's own loop, held at its loader, its forward, backward and optimizer timed from outside."""
    from megatron_octo.platform import resolve

    resolve().activate()
    from megatron.core import pipeline_parallel

    from megatron_octo.data.loader import Loader
    from megatron_octo.train import run, step

    fetch, micro_batch, schedule = Loader.step, Loader._micro_batch, pipeline_parallel.get_forward_backward_func
    build = run.build_optimizer

    def gated_step(self: Loader, consumed_sequences: int) -> Any:
        gate()
        return fetch(self, consumed_sequences)

    def counted_optimizer(wrapped: Any, *args: Any) -> Any:
        optimizer = build(wrapped, *args)
        optimizer.zero_grad = gate.counted(optimizer.zero_grad)
        for chunk in wrapped:
            check_size(chunk)
            chunk.zero_grad_buffer = gate.counted(chunk.zero_grad_buffer)
        return optimizer

    Loader.step, Loader._micro_batch = gated_step, gate.counted(micro_batch, sign=-1)  # type: ignore[method-assign]
    pipeline_parallel.get_forward_backward_func = lambda: gate.counted(schedule())
    run.build_optimizer = counted_optimizer  # type: ignore[assignment]
    step.gradient_norm, step.update = gate.counted(step.gradient_norm), gate.counted(step.update)
    run.train(config)


def transformers(config: MidTrainConfig, gate: Gate) -> None:
    """A loop as one writes it by hand."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=MODEL.hidden_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_heads,
            num_key_value_heads=MODEL.num_kv_heads,
            intermediate_size=MODEL.ffn_size,
            vocab_size=MODEL.vocab_size,
            tie_word_embeddings=True,
            max_position_embeddings=SEQ_LENGTH,
            attn_implementation="sdpa",
        )
    )
    check_size(model)
    numbers = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK, betas=(numbers.beta1, numbers.beta2), weight_decay=numbers.weight_decay
    )
    for batch in batches(gate):
        loss = model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), numbers.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


def pretrain(config: MidTrainConfig, gate: Gate, *, our_attention: bool = False) -> None:
    """megatron's own loop and arguments, told to do without a GPU."""
    import torch

    from megatron_octo.platform import megatron_cpu

    megatron_cpu.install()
    torch.cuda.device_count = lambda: 1
    sys.argv = ["pretrain", *pretrain_arguments(config)]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from megatron.core.enums import ModelType
    from megatron.training import initialize, training
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    training.initialize_megatron = partial(initialize.initialize_megatron, allow_no_cuda=True)
    initialize._compile_dependencies = lambda: None  # the data sets' helpers, which no side uses

    def forward_step(batches: Iterator[Any], model: Any) -> tuple[Any, Any]:
        batch = next(batches)
        check_size(model)
        out = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return out, partial(loss_sum, batch["loss_mask"])

    def provide(_sizes: Any) -> tuple[Any, None, None]:
        return batches(gate), None, None

    provide.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args()
    model = gpt_config_from_args(args)
    if our_attention:
        model.transformer_layer_spec = spec_with_our_attention
    everything = pretrain_cfg_container_from_args(args, model)
    training.pretrain(everything, provide, ModelType.encoder_or_decoder, forward_step)


def spec_with_our_attention(*args: Any, **kwargs: Any) -> Any:
    """megatron's local layer, its attention ours."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_octo.model.layers import causal_attention_class

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = causal_attention_class()
    return spec


def loss_sum(loss_mask: Any, losses: Any) -> tuple[Any, Any, dict[str, Any]]:
    """As pretrain_gpt.py has it."""
    import torch

    total, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def pretrain_arguments(config: MidTrainConfig) -> list[str]:
    """The same model and step as megatron's options; without a GPU its fusions are off."""
    numbers = config.optimizer
    values = {
        "num-layers": MODEL.num_layers,
        "hidden-size": MODEL.hidden_size,
        "num-attention-heads": MODEL.num_heads,
        "num-query-groups": MODEL.num_kv_heads,
        "ffn-hidden-size": MODEL.ffn_size,
        "vocab-size": MODEL.vocab_size - 1,  # its tokenizer adds one
        "make-vocab-size-divisible-by": MODEL.vocab_size,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "seq-length": SEQ_LENGTH,
        "max-position-embeddings": SEQ_LENGTH,
        "micro-batch-size": SEQUENCES,
        "global-batch-size": SEQUENCES,
        "train-iters": ENOUGH_STEPS,
        "eval-iters": 0,
        "eval-interval": ENOUGH_STEPS,
        "log-interval": config.log_every_steps,
        "lr": PEAK,
        "lr-decay-style": "constant",
        "adam-beta2": numbers.beta2,
        "weight-decay": numbers.weight_decay,
        "clip-grad": numbers.clip_norm,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "transformer-impl": "local",
        "tokenizer-type": "NullTokenizer",
        "dataloader-type": "external",
        "distributed-backend": "gloo",
    }
    flags = (
        *("group-query-attention", "swiglu", "disable-bias-linear", "use-cpu-initialization"),
        *("use-distributed-optimizer", "no-gradient-accumulation-fusion", "no-masked-softmax-fusion"),
        *("no-bias-swiglu-fusion", "no-bias-dropout-fusion", "no-rope-fusion", "no-persist-layer-norm"),
    )
    return [*(f"--{name}={value}" for name, value in values.items()), *(f"--{name}" for name in flags)]


SIDES: dict[str, Callable[[MidTrainConfig, Gate], None]] = {
    "ours": ours,
    "transformers": transformers,
    "pretrain": pretrain,
    "pretrain_our_attention": partial(pretrain, our_attention=True),
}


def batches(gate: Gate) -> Iterator[dict[str, Any]]:
    """Random tokens, made before the gate."""
    import torch

    while True:
        tokens = torch.randint(0, MODEL.vocab_size, (SEQUENCES, SEQ_LENGTH + 1))
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(SEQUENCES, SEQ_LENGTH),
            "position_ids": torch.arange(SEQ_LENGTH).repeat(SEQUENCES, 1),
        }
        gate()
        yield batch


@cache
def check_size(model: Any) -> None:
    """All sides train as many parameters; looked at once."""
    size = sum(each.numel() for each in model.parameters())
    assert size == MODEL.num_parameters, f"{size:,} parameters, not {MODEL.num_parameters:,}"


def loader_tokens_per_second(config: MidTrainConfig) -> float:
    """Tokens that the loader gives in a CPU second."""
    from megatron_octo.data.loader import Loader, build_dataset
    from megatron_octo.data.mixture import read_mixture
    from megatron_octo.platform import resolve
    from megatron_octo.platform.process_group import model_parallel

    platform, steps = resolve(), 200
    with model_parallel(platform, ParallelConfig()), tempfile.TemporaryDirectory() as cache:
        dataset = build_dataset(
            read_mixture(config.data, model_vocab_size=MODEL.vocab_size),
            num_sequences=steps * SEQUENCES,
            seq_length=SEQ_LENGTH,
            seed=0,
            cache=Path(cache),
            reads_data=True,
        )
        loader = Loader(
            dataset=dataset,
            data_rank=0,
            data_ranks=1,
            micro_batch_sequences=SEQUENCES,
            num_micro_batches=1,
            device="cpu",
        )
        start = time.process_time()
        for step in range(steps):
            for _ in loader.step(step * SEQUENCES):
                pass
        return steps * SEQUENCES * SEQ_LENGTH / (time.process_time() - start)


def on_words(folder: Path, seq_length: int) -> MixtureConfig:
    """The data that `prepare_words` makes in `folder`."""
    source = SourceConfig(name="words", path=folder / "words", weight=1.0, max_epochs=1e9)
    return MixtureConfig(sources=(source,), tokenizer=folder / "tokenizer", seq_length=seq_length)


def prepare_words(folder: Path, *, vocab_size: int, documents: int = 500) -> None:
    """Random words, some more common than others by Zipf's law, prepared with a tokenizer of their own."""
    import random

    import tokenizers

    from megatron_octo.data.prepare import prepare

    words = [f"w{number}" for number in range(vocab_size - 1)]
    weights = [*accumulate(1 / rank for rank in range(1, vocab_size))]
    vocabulary = {word: number for number, word in enumerate((*words, "</s>"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    draw = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(documents):
            text = " ".join(draw.choices(words, cum_weights=weights, k=draw.randint(100, 1000)))
            file.write(json.dumps({"text": text}) + "\n")
    prepare(
        PrepareConfig(
            name="words",
            input=folder / "text.jsonl",
            template="text",
            tokenizer=folder / "tokenizer",
            output=folder / "words",
            bos=False,
        ),
        num_workers=1,
    )


def prepare_stage(folder: Path) -> MidTrainConfig:
    """A stage, and the words that it reads, prepared."""
    prepare_words(folder, vocab_size=MODEL.vocab_size)
    return MidTrainConfig(
        name="train-step",
        model=MODEL,
        start=FromScratch(),
        data=on_words(folder, SEQ_LENGTH),
        budget=BudgetConfig(
            train_tokens=ENOUGH_STEPS * SEQUENCES * SEQ_LENGTH,
            batch_sequences=SEQUENCES,
            micro_batch_sequences=SEQUENCES,
        ),
        learning_rate=ConstantRate(peak=PEAK),
        precision=PrecisionConfig(dtype="fp32"),
        save=SaveConfig(every_steps=ENOUGH_STEPS),
    )


if __name__ == "__main__":
    main()
