"""A Hugging Face folder -> a megatron checkpoint that training starts from at any parallel layout.

Weights are renamed, joined and stacked by the one table in `model/mapping.py`; their numbers and number formats
stay as they are. That, and that both models give the same logits, is checked before the result appears. Run it with
`octo convert from-hf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_octo import console, lineage, rundir
from megatron_octo.config.base import read_settings, to_dict
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert import hf_folder, sample, torch_dist
from megatron_octo.convert.compare import compare_import
from megatron_octo.convert.output import check_room, continued, finished
from megatron_octo.convert.sums import Sums
from megatron_octo.convert.verify import check_kept, is_verified
from megatron_octo.convert.verify import verify as verify_import
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping
from megatron_octo.model.weights import MODEL_FILE


def from_hf(
    hf: Path,
    output: Path,
    *,
    name: str = "",
    verify: bool = True,
    text: Path = sample.TEXT,
    logits: bool = True,
    overwrite: bool = False,
) -> Path:
    """Convert the Hugging Face folder `hf` into `output`; returns `output`. `name` is the base's, for its lineage.

    `verify` compares all weights, and `logits` runs both models on `text`.

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
            if done.parent is None or done.parent.weights_sha256 != sums.total():
                told = f"{output} was made from other weights than {hf}"
                raise BadInput(told, fix="give another folder, or --overwrite")
            _check_same(output, model)
            check_kept(output, done, torch_dist.WEIGHT_FILES)
            if verify and not is_verified(output, logits=logits):
                verify_import(output, hf, logits=logits, text=text, into=output)
            log.info("%s is there already, made from %s", output, hf)
            return output
        weights = {(weight.key, weight.layer or 0): weight for weight in mapping.weights(model)}
        pieces = list(_pieces(model, tensors, sums))
        check_room(output, sum(piece.num_bytes() for piece in pieces))

        def check(reader: torch_dist.Reader, written: Sequence[torch_dist.Piece]) -> None:
            if verify:
                compare_import(reader, [weights[piece.key, piece.offset[0]] for piece in written], tensors)

        files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in hf.glob(hf_folder.WEIGHT_FILES)}
        plan = {"model": to_dict(model), "files": files, "code": lineage.code_version()}
        with continued(output, plan, torch_dist.KEPT) as folder:
            digest = torch_dist.write(folder, pieces, check=check)
            rundir.write_json(folder / MODEL_FILE, to_dict(model))
            hf_folder.copy_licence(hf, folder)
            parent = _parent(hf, name, sums.total())
            link = lineage.Lineage(name=parent.name, kind="import", weights_sha256=digest, parent=parent)
            lineage.write(folder, link)
            if verify:
                verify_import(folder, hf, weights=False, logits=logits, text=text, into=folder)
    log.info("%s: %s parameters from %s", output, f"{model.num_parameters:,}", hf)
    return output


def _check_same(output: Path, model: ModelConfig) -> None:
    """Refuse a finished import whose settings are not those of its base by now."""
    made_with = to_dict(read_settings(ModelConfig, output / MODEL_FILE))
    lines = [f"{name}: {old!r}, now {new!r}" for name, old, new in rundir.differences(made_with, to_dict(model))]
    if lines:
        raise BadInput(
            f"{output} was made with another {hf_folder.CONFIG}: {'; '.join(lines)}",
            fix="give another folder, or --overwrite",
        )


def _parent(hf: Path, name: str, digest: str) -> lineage.Lineage:
    known = lineage.read_if_present(hf)
    if known is not None and known.weights_sha256 == digest:
        return known
    return lineage.Lineage(name=name or hf.resolve().name, kind="base", weights_sha256=digest)


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
        return weight.join([tensors.read(name) for name, _ in weight.parts]).reshape(shape)

    return torch_dist.Piece(
        key=weight.key,
        global_shape=stacked,
        offset=(weight.layer or 0, *[0] * (len(stacked) - 1)),
        shape=shape,
        dtype=dtype,  # type: ignore[arg-type]
        make=make,  # type: ignore[arg-type]
    )
