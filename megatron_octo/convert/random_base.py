"""A base model of random weights in Hugging Face format, for roads that download nothing. Needs no megatron."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_octo import console, lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.convert import hf_folder
from megatron_octo.convert.output import finished
from megatron_octo.convert.safetensors_file import Named
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from megatron_octo.config.model import ModelConfig
    from megatron_octo.config.pipeline import RandomBaseConfig

SETTINGS = "random_base.json"
NAME = "random"
RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""Matrices whose result is added to the residual stream."""


def random_base(config: RandomBaseConfig, *, overwrite: bool = False) -> Path:
    """Write the model that `config` describes, in fp32; returns its folder.

    Matrices are normal with `model.init_std`, those that write to the residual stream with
    init_std / sqrt(2 * num_layers), as megatron initialises them; norms are 1, biases 0. The same seed gives the
    same weights.

    Raises:
        BadInput: no tokenizer, one with more ids than the model has rows, or an output made with
            other settings (`overwrite` replaces it).
    """
    log = console.logger(__name__)
    settings = to_dict(config)
    if finished(config.output, "base", overwrite=overwrite) is not None:
        made_with = rundir.read_json(config.output / SETTINGS) if (config.output / SETTINGS).exists() else {}
        if told := rundir.other_settings(config.output, made_with, settings):
            raise BadInput(told, fix="give another folder, or --overwrite")
        log.info("%s is there already", config.output)
        return config.output
    tokenizer = hf_folder.read_tokenizer(config.tokenizer, config.model)
    with rundir.new_folder(config.output.resolve()) as folder:
        tensors = ([each] for each in _tensors(config.model, config.seed))
        digest = hf_folder.write_weights(folder, tensors, "fp32")
        hf_folder.write_settings(folder, config.model, tokenizer, "fp32")
        rundir.write_json(folder / SETTINGS, settings)
        lineage.write(folder, lineage.Lineage(name=NAME, kind="base", weights_sha256=digest))
    log.info("%s: %s random parameters", config.output, f"{config.model.num_parameters:,}")
    return config.output


def _tensors(model: ModelConfig, seed: int) -> Iterator[Named]:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.empty(shape).normal_(std=std, generator=generator)

    for name, shape in mapping.hf_shapes(model).items():
        std = model.init_std / (2 * model.num_layers) ** 0.5 if name.endswith(RESIDUAL) else model.init_std

        def make(name: str = name, shape: tuple[int, ...] = shape, std: float = std) -> torch.Tensor:
            if len(shape) > 1:
                return normal(shape, std)
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)

        yield Named(name=name, shape=shape, make=make)
