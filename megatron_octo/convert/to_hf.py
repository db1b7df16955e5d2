"""A save of any parallel layout -> a whole Hugging Face folder: for vLLM, OpenRLHF and everything else.

Reads the save tensor by tensor without a GPU, renames by the one table in `model/mapping.py`, writes safetensors,
config, tokenizer and lineage, and checks the result before it appears. Run it with `octo convert to-hf`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import console, lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.train import ChatTemplate
from megatron_octo.convert import hf_folder, model_card, sample
from megatron_octo.convert.compare import compare_export
from megatron_octo.convert.output import check_room, continued, finished
from megatron_octo.convert.safetensors_file import Named
from megatron_octo.convert.save import Save
from megatron_octo.convert.sums import Sums
from megatron_octo.convert.torch_dist import WEIGHT_FILES
from megatron_octo.convert.verify import check_kept, is_verified
from megatron_octo.convert.verify import verify as verify_export
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping

if TYPE_CHECKING:
    import torch

    from megatron_octo.config.model import ModelConfig


def to_hf(
    save: Path,
    output: Path,
    tokenizer: Path,
    *,
    dtype: hf_folder.Dtype = "bf16",
    config: Path | None = None,
    chat_template: ChatTemplate = "plain",
    verify: bool = True,
    text: Path = sample.TEXT,
    logits: bool = True,
    overwrite: bool = False,
) -> Path:
    """Convert the save in `save` (a step's folder, or an imported base) into `output`; returns `output`.

    A plain Megatron checkpoint is converted as well; `config` is a Hugging Face folder of a model of its shape.
    `verify` compares all weights, and `logits` runs both models on `text`.

    The save's and the tokenizer's folder may hold the licence of the base, to copy. An `output` that was made from the
    same weights in the same number format, with this tokenizer and template, is left as it is; a comparison that it
    lacks is made.

    Raises:
        BadInput: not a save, no fitting tokenizer, or an `output` made from or with something else, or damaged
            since (`overwrite` replaces it).
        VerificationError: the export is not the save's model; no `output` is left.
    """
    log = console.logger(__name__)
    known = lineage.read_if_present(save)
    is_import = known is not None and known.kind == "import"  # it has no checksums, which are looked at before
    with Sums(save.glob(WEIGHT_FILES) if is_import else ()) as sums, ThreadPoolExecutor(1) as beside:
        source = Save(save, config, on_read=sums.reach if is_import else None)
        parent = source.lineage()
        done = finished(output, "export", overwrite=overwrite)
        words = beside.submit(hf_folder.read_tokenizer, tokenizer, source.model)  # imports for seconds
        rest = _Rest(source=source, tokenizer=tokenizer, words=words, dtype=dtype, chat_template=chat_template)
        if done is not None:
            _check_same(output, done, parent, rest)
            if verify and not is_verified(output, logits=logits):
                verify_export(save, output, config, logits=logits, text=text, into=output)
                rest.write_card(output, done)
            log.info("%s is there already, made from %s", output, save)
            return output
        for told in source.warnings():
            log.warning("%s", told)
        check_room(output, hf_folder.num_bytes(source.model, dtype))

        def check(written: hf_folder.Weights) -> None:
            if words.done():
                words.result()  # its error ends the work
            if verify:
                compare_export(source, written)

        with continued(output, _plan(parent, source.model, dtype), (hf_folder.WEIGHT_FILES,)) as folder:
            digest = hf_folder.write_weights(folder, _tensors(source), dtype, check=check)
            if is_import and sums.total() != parent.weights_sha256:
                raise BadInput(f"the import {save} was damaged since it was made", fix="import it again: --overwrite")
            rest.write_settings(folder)
            link = lineage.Lineage(
                name=parent.name, kind="export", weights_sha256=digest, step=parent.step, parent=parent
            )
            lineage.write(folder, link)
            if verify:
                verify_export(save, folder, config, weights=False, logits=logits, text=text, into=folder)
            rest.write_card(folder, link)
    log.info("%s: %s, %s parameters", output, dtype, f"{source.model.num_parameters:,}")
    return output


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rest:
    """All of an export but its weights."""

    source: Save
    tokenizer: Path
    words: Future[hf_folder.Tokenizer]
    """The tokenizer, once it is loaded."""
    dtype: hf_folder.Dtype
    chat_template: ChatTemplate

    def write_settings(self, folder: Path) -> None:
        """config.json, generation_config.json, the tokenizer and its template."""
        hf_folder.write_settings(folder, self.source.model, self.words.result(), self.dtype)
        if self.chat_template == "plain":
            hf_folder.write_plain_template(folder)

    def write_card(self, folder: Path, link: lineage.Lineage) -> None:
        """README.md and the licence; it says whether the folder holds a report."""
        model_card.write(
            folder, link, self.source.model, save=self.source.folder, base=self.tokenizer, dtype=self.dtype
        )


def _check_same(output: Path, done: lineage.Lineage, parent: lineage.Lineage, rest: _Rest) -> None:
    """Refuse a finished export of other weights, in another format or with other settings, or damaged since."""
    fix = "give another folder, or --overwrite"
    if done.parent is None or done.parent.weights_sha256 != parent.weights_sha256:
        raise BadInput(f"{output} was made from other weights", fix=fix)
    found, wanted = rundir.read_json(output / hf_folder.CONFIG)["torch_dtype"], hf_folder.TORCH_NAMES[rest.dtype]
    if found != wanted:
        raise BadInput(f"{output} is in {found}, not {wanted}", fix=fix)
    with tempfile.TemporaryDirectory() as name:
        rest.write_settings(Path(name))
        differing = [file for file, *_ in rundir.differences(_sums(output), _sums(Path(name)))]
    if differing:
        raise BadInput(f"{output} has another {', '.join(differing)} than asked for", fix=fix)
    check_kept(output, done, hf_folder.WEIGHT_FILES)


def _plan(parent: lineage.Lineage, model: ModelConfig, dtype: hf_folder.Dtype) -> dict[str, Any]:
    """What an attempt that was killed must have begun with for its files to be kept."""
    return {
        "weights_sha256": parent.weights_sha256,
        "model": to_dict(model),
        "dtype": dtype,
        "code": lineage.code_version(),
    }


def _sums(folder: Path) -> dict[str, str]:
    names = (hf_folder.CONFIG, hf_folder.GENERATION, *hf_folder.TOKENIZER_FILES)
    return {name: rundir.sha256(folder / name) for name in names if (folder / name).exists()}


def _tensors(source: Save) -> Iterator[list[Named]]:
    @functools.lru_cache(1)  # its parts follow each other
    def read(key: str, layer: int | None) -> torch.Tensor:
        return source.read(key, layer)

    def part(weight: mapping.Weight, index: int) -> torch.Tensor:
        return weight.part(read(weight.key, weight.layer), index)

    for weight in mapping.weights(source.model):
        yield [
            Named(name=name, shape=shape, make=functools.partial(part, weight, index))
            for index, (name, shape) in enumerate(weight.parts)
        ]
