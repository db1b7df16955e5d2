"""A Hugging Face folder -> a megatron checkpoint that training starts from at any parallel layout.

Weights are renamed, joined and stacked by the one table in `model/mapping.py`; their numbers and number formats
stay as they are. That, and that both models give the same logits, is checked before the result appears. Run it with
`octo convert from-hf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_octo import console, lineage, rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert import hf_folder, sample, torch_dist
from megatron_octo.convert.compare import compare_import
from megatron_octo.convert.output import check_room, continued, finished
from megatron_octo.convert.page_cache import populate
from megatron_octo.convert.sums import Sums
from megatron_octo.convert.verify import check_kept, is_verified
from megatron_octo.convert.verify import verify as verify_import
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping
from megatron_octo.model.weights import MODEL_FILE, read_model


def from_hf(
    hf: Path,
    output: Path,
    *,
    name: str = "",
    origin: str = "",
    verify: bool = True,
    text: Path = sample.TEXT,
    logits: bool = True,
    overwrite: bool = False,
) -> Path:
    """Convert the Hugging Face folder `hf` into `output`; returns `output`.

    `name` is the base's and `origin` where it was downloaded from, for its lineage. `verify` compares all weights, and
    `logits` runs both models on `text`.

    An `output` that was made from the same weights is left as it is; a comparison that it lacks is made.

    Raises:
        BadInput: a model that training cannot express, weights that do not fit its config, or an
            `output` made from other weights, or damaged since (`overwrite` replaces it).
        VerificationError: what is on the disk is not the model of `hf`; no `output` is left.
    """
    log = console.logger(__name__)
    model = hf_folder.read_model_config(hf)
    with Sums(hf.glob(hf_folder.WEIGHT_FILES)) as sums:
        tensors = hf_folder.Weights(hf)
        tensors.check(model)
        done = finished(output, "import", overwrite=overwrite)
        if done is not None:
            _check_same(output, done, hf, model, sums)
            if verify and not is_verified(output, logits=logits):
                verify_import(output, hf, logits=logits, text=text, into=output)
            log.info("%s is there already, made from %s", output, hf)
            return output
        pieces = list(_pieces(model, tensors, sums))
        check_room(output, sum(piece.num_bytes() for piece in pieces))
        with continued(output, _plan(hf, model), torch_dist.KEPT) as folder:
            check = _comparison(model, tensors) if verify else torch_dist.unchecked
            digest = torch_dist.write(folder, pieces, check=check)
            _write_records(folder, model, digest, _parent(hf, name, origin, sums.total()))
            lineage.copy_licence(hf, folder)
            if verify:
                verify_import(folder, hf, weights=False, logits=logits, text=text, into=folder)
    log.info("%s: %s parameters from %s", output, f"{model.num_parameters:,}", hf)
    return output


def _check_same(output: Path, done: lineage.Lineage, hf: Path, model: ModelConfig, sums: Sums) -> None:
    """Refuse a finished import that was made from something else than `hf` is by now, or damaged since."""
    fix = "give another folder, or --overwrite"
    if done.parent is None or done.parent.weights_sha256 != sums.total():
        raise BadInput(f"{output} was made from other weights than {hf}", fix=fix)
    if told := rundir.other_settings(output, to_dict(read_model(output)), to_dict(model)):
        raise BadInput(told, fix=fix)
    check_kept(output, done, torch_dist.WEIGHT_FILES)


def _plan(hf: Path, model: ModelConfig) -> dict[str, Any]:
    """What an attempt that was killed must have begun with for its files to be kept."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in hf.glob(hf_folder.WEIGHT_FILES)}
    return {"model": to_dict(model), "files": files, "code": lineage.code_version()}


def _comparison(model: ModelConfig, tensors: hf_folder.Weights) -> torch_dist.Check:
    """Compares the pieces of a file with the tensors that they were made of."""
    weights = {(weight.key, weight.layer or 0): weight for weight in mapping.weights(model)}

    def check(reader: torch_dist.Reader, written: Sequence[torch_dist.Piece]) -> None:
        compare_import(reader, [weights[piece.key, piece.offset[0]] for piece in written], tensors)

    return check


def _write_records(folder: Path, model: ModelConfig, digest: str, parent: lineage.Lineage) -> None:
    """model.json, and lineage.json with its checksum."""
    rundir.write_json(folder / MODEL_FILE, to_dict(model))
    described = rundir.sha256(folder / MODEL_FILE)
    link = lineage.Lineage(
        name=parent.name, kind="import", weights_sha256=digest, recipe_sha256=described, parent=parent
    )
    lineage.write(folder, link)


def _parent(hf: Path, name: str, origin: str, digest: str) -> lineage.Lineage:
    known = lineage.read_if_present(hf)
    if known is None or known.weights_sha256 != digest:
        known = lineage.Lineage(name=name or hf.resolve().name, kind="base", weights_sha256=digest)
    return replace(known, origin=origin or known.origin)


def _pieces(model: ModelConfig, tensors: hf_folder.Weights, sums: Sums) -> Iterator[torch_dist.Piece]:
    dtypes: dict[str, object] = {}
    for weight in mapping.weights(model):
        found = {tensors.dtype(name) for name, _ in weight.parts}
        dtype = found.pop()
        if found or dtypes.setdefault(weight.key, dtype) != dtype:
            raise BadInput(
                f"{tensors.folder}: the parts of {weight.key} are of several number formats",
                fix="save the model in one format",
            )
        yield _piece(weight, model, tensors, dtype, sums)


def _piece(
    weight: mapping.Weight,
    model: ModelConfig,
    tensors: hf_folder.Weights,
    dtype: object,
    sums: Sums,
) -> torch_dist.Piece:
    stacked = mapping.stacked_shape(weight, model)
    inside = weight.layer is not None
    shape = (1, *weight.shape) if inside else weight.shape

    def make() -> object:
        for name, _ in weight.parts:
            sums.reach(tensors.file(name))
        parts = [tensors.read(name) for name, _ in weight.parts]
        populate(*parts)
        return weight.join(parts).reshape(shape)

    return torch_dist.Piece(
        key=weight.key,
        global_shape=stacked,
        offset=(weight.layer or 0, *[0] * (len(stacked) - 1)),
        shape=shape,
        dtype=dtype,  # type: ignore[arg-type]
        make=make,  # type: ignore[arg-type]
    )
