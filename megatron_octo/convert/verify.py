"""Checks a conversion: every tensor bit for bit, and the logits of both models at every position of a text.

The second check is what makes the first one worth something: renaming and joining wrongly, but in the same way in
both directions, would leave all bits in place. Megatron's model is filled by megatron's own names, without
`model/mapping.py`. Run it with `octo convert verify`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo import console, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.train import ParallelConfig, PrecisionConfig
from megatron_octo.convert import hf_folder, sample
from megatron_octo.convert.compare import SHOWN, compare_export
from megatron_octo.convert.free_memory import available_bytes
from megatron_octo.convert.save import Save
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.model import mapping

if TYPE_CHECKING:
    import torch

    from megatron_octo.config.model import ModelConfig
    from megatron_octo.lineage import Lineage

REPORT = "verify.json"
POSITIONS = 1024
MAX_LOGIT_DIFFERENCE = 1e-4
MAX_MEAN_KL = 1e-9
MAX_RELATIVE_DIFFERENCE = 1e-5
"""Of the largest logit; tells more than the bar above where all logits are small, as those of a random model."""
TIE = 1e-5
"""Two logits closer than this may change places: fp32 sums in another order."""
FP32_BYTES, SPARE, LOGITS = 4, 1.25, 3
"""A whole model is built where so many times its weights are free, and so many times the logits."""
COMPARED = 64
"""Positions whose logits are compared at once: in fp64, several times over."""
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
HF_LAYER = "layers.0."


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was compared, and how it came out."""

    num_tensors: int
    """Tensors equal bit for bit after a round trip."""
    vocab_size: int = 0
    """Rows of the vocabulary that were compared."""
    vocab_rows: int = 0
    """Rows of it in the save; those after `vocab_size` are padding of a plain checkpoint, and left out."""
    settings: str = ""
    """The folder that a plain checkpoint's settings are taken from; what no tensor shows of them is not proven."""
    num_positions: int = 0
    """Positions whose logits were compared, in fp32, with the weights as exported; 0 where that was left out."""
    max_logit_difference: float = 0.0
    """Largest absolute difference of two logits; the bar is 1e-4, and 1e-5 of the largest logit."""
    num_argmax_differences: int = 0
    """Positions at which the models choose another token, ties apart; the bar is 0."""
    mean_kl: float = 0.0
    """Mean Kullback-Leibler divergence of Megatron's prediction from Hugging Face's, nats; the bar is 1e-9."""
    max_logit: float = 0.0
    """Largest absolute logit, as the scale of the difference."""
    tokens: str = ""
    """What stood at the positions: tokens of which text, or random ones and why."""
    streamed: bool = False
    """Whether the logits were computed layer by layer, since a whole model did not fit in free memory."""


def verify(
    save: Path,
    hf: Path,
    config: Path | None = None,
    *,
    weights: bool = True,
    logits: bool = True,
    text: Path = sample.TEXT,
    into: Path | None = None,
) -> Report:
    """Compare the folder `hf` with the save it was made from, or that was made from it.

    `config` is as for `to_hf`. `weights` says that they were not compared yet; `logits` that both models shall run, at
    1,024 positions of `text`; `into` is the folder of ours that gets `verify.json`, if any.

    Raises:
        BadInput: one of the folders is not what it should be.
        VerificationError: they differ; the message says where. No `verify.json` remains in `into`.
    """
    source = Save(save, config)
    try:
        report = _compare(source, hf, text, weights=weights, logits=logits)
        report = replace(
            report,
            vocab_size=source.model.vocab_size,
            vocab_rows=source.vocab_rows,
            settings="" if config is None else str(config),
        )
    except (BadInput, VerificationError):
        if into is not None:
            (into / REPORT).unlink(missing_ok=True)
        raise
    if into is not None:
        rundir.write_json(into / REPORT, asdict(report))
    console.logger(__name__).info("%s", describe(report))
    return report


def is_verified(folder: Path, *, logits: bool) -> bool:
    """Whether `folder` holds the report of a comparison, of the logits too where they are asked for."""
    path = folder / REPORT
    return path.exists() and (not logits or rundir.read_json(path)["num_positions"] > 0)


def check_kept(output: Path, done: Lineage, pattern: str) -> None:
    """Read the weights of a finished `output`, which match `pattern`, once.

    Raises:
        BadInput: they are not those that `done`, its lineage, names.
    """
    if rundir.sha256_folder(output, pattern) != done.weights_sha256:
        raise BadInput(f"{output} is damaged: {pattern} are not as they were written", fix="convert with --overwrite")


def describe(report: Report) -> str:
    """The report as one line."""
    if not report.num_positions:
        return f"verified: {report.num_tensors} tensors bit-identical; logits not compared"
    how = "layer by layer over streamed weights" if report.streamed else "whole models"
    return (
        f"verified: {report.num_tensors} tensors bit-identical; logits over {report.num_positions:,} positions "
        f"({report.tokens}) within {report.max_logit_difference:.1e} (largest logit {report.max_logit:.1f}), "
        f"same most likely token everywhere (ties within {TIE:.0e} apart), KL {report.mean_kl:.1e}; {how}"
    )


def _compare(source: Save, hf: Path, text: Path, *, weights: bool, logits: bool) -> Report:
    import torch

    exported = hf_folder.Weights(hf)
    exported.check(source.model)
    _compare_settings(source.model, hf)
    if weights:
        compare_export(source, exported)
    names = mapping.hf_shapes(source.model).keys()
    if not logits:
        return Report(num_tensors=len(names))
    dtypes = {exported.dtype(name) for name in names}
    # an import keeps several formats as they are, and fp32 holds them all; an export is in one
    report = _compare_logits(source, hf, dtypes.pop() if len(dtypes) == 1 else torch.float32, text)
    failures = []
    bar = min(MAX_LOGIT_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * report.max_logit)
    if not report.max_logit_difference <= bar:  # a NaN fails too
        failures.append(f"logits differ by up to {report.max_logit_difference:.3g} (bar {bar:.3g})")
    if report.num_argmax_differences:
        failures.append(f"the most likely token differs at {report.num_argmax_differences} positions")
    if not report.mean_kl <= MAX_MEAN_KL:
        failures.append(f"KL is {report.mean_kl:.3g} (bar {MAX_MEAN_KL:.0e})")
    if failures:
        raise VerificationError(
            f"{hf} is not the model of {source.folder}: {'; '.join(failures)}, over {report.num_positions:,} positions",
            fix="do not use this conversion; convert again, and report it if it stays",
        )
    return replace(report, num_tensors=len(names))


def _compare_settings(model: ModelConfig, hf: Path) -> None:
    there = to_dict(hf_folder.read_model_config(hf))
    if told := rundir.other_settings(hf / hf_folder.CONFIG, there, to_dict(model)):
        raise VerificationError(told, fix="convert again")


def _compare_logits(source: Save, hf: Path, dtype: torch.dtype, text: Path) -> Report:
    import torch

    length = min(source.model.max_positions, POSITIONS)  # long sequences show a wrong rotary scale best
    rows = -(-POSITIONS // length)
    tokens, told = sample.tokens(hf, text, vocab_size=source.model.vocab_size, rows=rows, length=length)
    with torch.no_grad():
        needed = SPARE * source.model.num_parameters + LOGITS * tokens.numel() * source.model.vocab_size
        streamed = available_bytes() < FP32_BYTES * needed
        theirs = _hf_logits_by_layer(source, hf, tokens) if streamed else _hf_logits(hf, tokens)
        ours = _megatron_logits(source, tokens, dtype, streamed=streamed)
        differences, kl, largest, scale = 0, 0.0, torch.zeros(()), torch.zeros(())
        for a, b in zip(*(each.flatten(0, 1).split(COMPARED) for each in (theirs, ours)), strict=True):
            largest = torch.maximum(largest, (a - b).abs().max())  # keeps a NaN
            scale = torch.maximum(scale, a.abs().max())
            chosen = a.gather(1, b.argmax(-1, keepdim=True)).squeeze(1)
            differences += int((a.max(-1).values - chosen > TIE).sum())
            log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
    return Report(
        num_tensors=0,
        num_positions=tokens.numel(),
        max_logit_difference=float(largest),
        num_argmax_differences=differences,
        mean_kl=kl / tokens.numel(),
        max_logit=float(scale),
        tokens=told,
        streamed=streamed,
    )


def _hf_logits(hf: Path, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' logits [rows, length, vocab] in fp32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(hf),
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,  # never a pickle, which a base's folder may hold as well
        )
    except Exception as error:
        raise BadInput(
            f"transformers cannot load {hf}: {error}", fix="mend the folder, or give --skip-logits to run no model"
        ) from None
    model.eval()
    return torch.cat([model(row[None]).logits for row in tokens])


def _hf_logits_by_layer(source: Save, hf: Path, tokens: torch.Tensor) -> torch.Tensor:
    """As `_hf_logits`, by transformers' model of one layer, which is given each layer's weights in turn."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    exported, num_layers = hf_folder.Weights(hf), source.model.num_layers
    config = AutoConfig.from_pretrained(str(hf), num_hidden_layers=1, layer_types=["full_attention"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    names = {name for name in model.state_dict() if name in exported.shapes}
    norm, hidden = model.model.norm, model.model.embed_tokens
    for layer in range(num_layers):
        wanted = {name for name in names if layer == 0 or HF_LAYER in name}
        model.load_state_dict(
            {name: exported.read(name.replace(HF_LAYER, f"layers.{layer}.")) for name in wanted}, strict=False
        )
        inputs = hidden(tokens) if layer == 0 else hidden
        last = layer == num_layers - 1
        model.model.norm = norm if last else torch.nn.Identity()
        run = model if last else model.model
        hidden = torch.cat([run(inputs_embeds=row[None])[0] for row in inputs])
    logits: torch.Tensor = hidden
    return logits


def _megatron_logits(source: Save, tokens: torch.Tensor, dtype: torch.dtype, *, streamed: bool) -> torch.Tensor:
    """Megatron's logits [rows, length, vocab] in fp32, of the save's weights rounded to `dtype`.

    `streamed`: by a model of one layer, which is given each layer's weights in turn.
    """
    import torch

    from megatron_octo.model.build import build_model
    from megatron_octo.platform import resolve
    from megatron_octo.platform.process_group import model_parallel

    alone, fp32 = ParallelConfig(), PrecisionConfig(dtype="fp32")
    platform = replace(resolve(), layer_family="local")  # plain fp32 arithmetic, on any device
    with model_parallel(platform, alone):
        shape = replace(source.model, num_layers=1) if streamed else source.model
        model = build_model(shape, platform=platform, parallel=alone, precision=fp32).eval()
        device, rounds = next(model.parameters()).device, source.model.num_layers if streamed else 1
        positions, norm = torch.arange(tokens.shape[1])[None].to(device), model.decoder.final_layernorm
        rows: list[torch.Tensor | None] = [None] * len(tokens)
        for first in range(rounds):
            _fill(model, source, dtype, first)
            model.post_process = last = first == rounds - 1  # else the result is hidden states
            model.decoder.final_layernorm = norm if last else None
            rows = [
                model(row[None].to(device), positions, None, decoder_input=hidden)
                for row, hidden in zip(tokens, rows, strict=True)
            ]
    return torch.cat([row.cpu() for row in rows if row is not None])


def _fill(model: torch.nn.Module, source: Save, dtype: torch.dtype, first: int) -> None:
    """Put a save's weights into a model on one rank, from layer `first` on, by the keys that megatron itself gives."""
    state = {}
    for name, entry in model.sharded_state_dict().items():
        if not name.endswith("_extra_state"):
            layer = LAYER.match(name)
            state[name] = source.read(entry.key, first + int(layer[1]) if layer else None).to(dtype)
    missing = [name for name in model.load_state_dict(state, strict=False).missing_keys if "_extra_state" not in name]
    if missing:
        raise VerificationError(f"megatron's model has weights that no save holds: {missing[:SHOWN]}")
