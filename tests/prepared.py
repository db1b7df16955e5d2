"""Small prepared data sets and a small stage, written without the data stages; for tests of what reads them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_octo.budget.ledger import Phase
from megatron_octo.config.base import fingerprint, to_dict
from megatron_octo.config.data import MixtureConfig, PrepareConfig, SourceConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.schedule import ConstantRate
from megatron_octo.config.train import (
    BudgetConfig,
    FromScratch,
    MidTrainConfig,
    PrecisionConfig,
    SaveConfig,
)
from megatron_octo.data.indexed import IndexedWriter, token_type
from megatron_octo.data.manifest import (
    Manifest,
    ShardRecord,
    TokenizerRecord,
    read_manifest,
    tokenizer_sha256,
    write_manifest,
)
from megatron_octo.data.mixture import read_mixture
from megatron_octo.data.phase import open_ledger, open_phase
from megatron_octo.rundir import mark_done, run_folder, step_folder, write_json
from megatron_octo.train.state import TrainState

VOCAB = 64
EOS = 2
SEQ_LENGTH = 32
BATCH = 8
MODEL = ModelConfig(
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=64,
    vocab_size=VOCAB,
    tied_embeddings=True,
    rope_theta=10_000.0,
    max_positions=64,
)


def write_tokenizer(folder: Path, content: str = "{}") -> Path:
    """A folder that has a tokenizer's identity and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(content)
    return folder


def write_source(folder: Path, tokenizer: Path, *, seed: int, documents: int = 200, vocab_size: int = VOCAB) -> Path:
    """A data set in two shards; documents follow a noisy rule, so that a model can learn something."""
    rng = np.random.default_rng(seed)

    def document() -> list[int]:
        ids = [int(rng.integers(3, VOCAB))]
        for _ in range(int(rng.integers(10, 60))):
            rule = 3 + (ids[-1] * (3 + seed) + 1) % (VOCAB - 3)
            ids.append(rule if rng.random() < 0.9 else int(rng.integers(3, VOCAB)))
        return [*ids, EOS]

    return write_documents(
        folder, tokenizer, [[document() for _ in range(documents // 2)] for _ in range(2)], vocab_size
    )


def write_uniform_source(folder: Path, tokenizer: Path) -> Path:
    """A data set whose every training sequence is the same, in whatever order it is read."""
    pattern = [int(i) for i in np.random.default_rng(7).integers(3, VOCAB, 8)]
    assert SEQ_LENGTH % len(pattern) == 0
    return write_documents(folder, tokenizer, [[pattern * 20] * 20], VOCAB)


def write_documents(folder: Path, tokenizer: Path, shards: list[list[list[int]]], vocab_size: int) -> Path:
    """A data set of these documents, a list a shard."""
    folder.mkdir(parents=True)
    dtype, records = token_type(vocab_size), []
    for number, documents in enumerate(shards):
        with IndexedWriter(folder / f"{number:05d}", dtype) as writer:
            for ids in documents:
                writer.add(ids)
        records.append(
            ShardRecord(
                prefix=f"{number:05d}",
                documents=writer.documents,
                tokens=writer.tokens,
                bin_sha256=writer.bin_sha256,
                idx_sha256=writer.idx_sha256,
            )
        )
    record = TokenizerRecord(
        sha256=tokenizer_sha256(tokenizer),
        vocab_size=vocab_size,
        bos_token=None,
        bos_id=None,
        eos_token="</s>",
        eos_id=EOS,
    )
    config = PrepareConfig(
        name=folder.name, input=Path("x.jsonl"), template="text", tokenizer=tokenizer, output=Path(), bos=False
    )
    write_manifest(
        folder,
        Manifest(
            config=config,
            packages=(),
            documents=sum(each.documents for each in records),
            tokens=sum(each.tokens for each in records),
            text_bytes=0,
            rejected=0,
            dtype=dtype,
            tokenizer=record,
            sources=(),
            shards=tuple(records),
        ),
    )
    mark_done(folder)
    return folder


def hold_out(source: Path, other: Path) -> None:
    """Make the shards of `other` validation shards of `source`."""
    shards = read_manifest(other).shards
    for shard in shards:
        for ending in (".bin", ".idx"):
            shutil.copy(other / f"{shard.prefix}{ending}", source / f"validation{shard.prefix}{ending}")
    validation = tuple(replace(shard, prefix=f"validation{shard.prefix}") for shard in shards)
    write_manifest(source, replace(read_manifest(source), validation=validation))


def write_data(folder: Path) -> None:
    """A tokenizer and the two sources that `stage` mixes."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    for seed, name in enumerate(("a", "b")):
        write_source(folder / name, tokenizer, seed=seed)


def stage(data: Path, name: str, *, steps: int = 20, save_every: int = 20) -> MidTrainConfig:
    """A stage of `steps` steps on `write_data(data)`, from random weights."""
    return MidTrainConfig(
        name=name,
        model=MODEL,
        start=FromScratch(),
        data=MixtureConfig(
            sources=(
                SourceConfig(name="a", path=data / "a", weight=0.7, max_epochs=1e9),
                SourceConfig(name="b", path=data / "b", weight=0.3, max_epochs=1e9),
            ),
            tokenizer=data / "tokenizer",
            seq_length=SEQ_LENGTH,
        ),
        budget=BudgetConfig(train_tokens=steps * BATCH * SEQ_LENGTH, batch_sequences=BATCH, micro_batch_sequences=2),
        learning_rate=ConstantRate(peak=3e-3),
        precision=PrecisionConfig(dtype="fp32"),
        save=SaveConfig(every_steps=save_every),
        log_every_steps=5,
    )


def write_cut_off_run(config: MidTrainConfig, step: int) -> Path:
    """The run's folder as it says, apart from weights, that the run was cut off after its save of `step`."""
    run, mixture = run_folder(config.name), read_mixture(config.data, model_vocab_size=VOCAB)
    save, phases, consumed = step_folder(run, step), (Phase(sources=config.data.sources),), step * BATCH
    dataset = open_phase(config, mixture, phases[0], cache=run / "index")
    assert dataset
    mark_done(run / "index", fingerprint(phases[0]))
    for folder in (run, save):
        write_json(folder / "config.json", to_dict(config))
    state = TrainState(
        step=step, consumed_sequences=consumed, tokens=step * config.batch_tokens, data=mixture.identities
    )
    state.write(save)
    write_json(save / "ledger.json", to_dict(open_ledger(config, mixture, phases, dataset).record(consumed)))
    mark_done(save)
    return run
