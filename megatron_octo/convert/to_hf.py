"""A save of any parallel layout -> a whole Hugging Face folder: for vLLM, OpenRLHF and everything else.

Reads the save tensor by tensor without a GPU, renames by the one table in `model/mapping.py`, writes safetensors,
config, tokenizer and lineage, and checks the result before it appears. Run it with `octo convert to-hf`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo import console, lineage, rundir
from megatron_octo.convert import hf_folder
from megatron_octo.convert.output import finished
from megatron_octo.convert.safetensors_file import Named
from megatron_octo.convert.save import Save
from megatron_octo.convert.verify import verify as verify_export
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping

if TYPE_CHECKING:
    import torch

CARD = "README.md"


def to_hf(
    save: Path,
    output: Path,
    tokenizer: Path,
    *,
    dtype: hf_folder.Dtype = "bf16",
    verify: bool = True,
    overwrite: bool = False,
) -> Path:
    """Convert the save in `save` (a step's folder, or an imported base) into `output`; returns `output`.

    An `output` that was made from the same weights in the same number format is left as it is.

    Raises:
        BadInput: not a save, no fitting tokenizer, or an `output` made from other weights or in another
            number format (`overwrite` replaces it).
        VerificationError: the export is not the save's model; no `output` is left.
    """
    log = console.logger(__name__)
    parent = lineage.read(save)
    done = finished(output, "export", overwrite=overwrite)
    if done is not None:
        _check_same(output, done, parent, dtype)
        log.info("%s is there already, made from %s", output, save)
        return output
    source = Save(save)
    words = hf_folder.read_tokenizer(tokenizer, source.model)
    with rundir.new_folder(output) as folder:
        hf_folder.write_weights(folder, _tensors(source), dtype)
        hf_folder.write_settings(folder, source.model, words, dtype)
        digest = rundir.sha256_folder(folder, hf_folder.WEIGHT_FILES)
        link = lineage.Lineage(name=parent.name, kind="export", weights_sha256=digest, step=parent.step, parent=parent)
        lineage.write(folder, link)
        rundir.write_atomic(folder / CARD, _card(link, dtype))
        if verify:
            verify_export(save, folder)
    log.info("%s: %s, %s parameters", output, dtype, f"{source.model.num_parameters:,}")
    return output


def _check_same(output: Path, done: lineage.Lineage, parent: lineage.Lineage, dtype: hf_folder.Dtype) -> None:
    if done.parent is None or done.parent.weights_sha256 != parent.weights_sha256:
        raise BadInput(f"{output} was made from other weights", fix="give another folder, or --overwrite")
    found, wanted = rundir.read_json(output / hf_folder.CONFIG)["torch_dtype"], hf_folder.TORCH_NAMES[dtype]
    if found != wanted:
        raise BadInput(f"{output} is in {found}, not {wanted}", fix="give another folder, or --overwrite")


def _tensors(source: Save) -> Iterator[Named]:
    for weight in mapping.weights(source.model):
        for index, (name, shape) in enumerate(weight.parts):
            yield Named(name=name, shape=shape, make=_maker(source, weight, index))


def _maker(source: Save, weight: mapping.Weight, index: int) -> Callable[[], torch.Tensor]:
    return lambda: weight.split(source.read(weight.key, weight.layer))[index]


def _card(link: lineage.Lineage, dtype: hf_folder.Dtype) -> str:
    chain = link.chain()
    rows = "\n".join(
        f"| {each.kind} | {each.name} | {'' if each.step is None else each.step} | {each.tokens:,} | "
        f"`{each.weights_sha256[:12]}` |"
        for each in chain
    )
    licence = (
        "Built with Llama. The licence of the base model, the Llama Community License, applies to this one too.\n\n"
        if "llama" in chain[0].name.lower()
        else ""
    )
    return (
        f"# {link.name}\n\n"
        f"{licence}"
        f"Made by megatron_octo: Stable-then-Decay mid-training, then `octo convert to-hf --dtype {dtype}`.\n"
        f"`verify.json` holds the comparison with the Megatron model that it was converted from.\n\n"
        "| made by | name | step | tokens trained | weights |\n|---|---|---|---|---|\n"
        f"{rows}\n"
    )
