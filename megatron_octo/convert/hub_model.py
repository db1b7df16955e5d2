"""A model on the Hugging Face Hub -> a folder of this machine, for `octo convert from-hf`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_octo.config.data import HubSource
from megatron_octo.convert.hf_folder import CONFIG, TOKENIZER_FILES, WEIGHT_FILES
from megatron_octo.data.hub import MODEL, explained
from megatron_octo.errors import BadInput
from megatron_octo.lineage import LICENCE_FILES

SETTINGS = ("*.json", *(name for name in TOKENIZER_FILES if not name.endswith(".json")), *LICENCE_FILES)
FILES = (WEIGHT_FILES, *SETTINGS)
"""Weights without code, settings, tokenizer, licence; no pickles, and no subfolder's second copy of the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A model's folder of this machine, and which commit of the Hub's it is."""

    folder: Path
    commit: str | None = None
    """The commit's whole hash; None for a folder that was named."""


def find_model(name: str, revision: str | None, *, weights: bool = True) -> Found:
    """`name` where it is a folder; else the files of the Hub's model `name` (`owner/name`), in huggingface_hub's cache.

    Without `weights`, all but these are downloaded.

    Raises:
        BadInput: it is neither; or the Hub cannot be reached, or does not give us the model.
        OctoError: the Hub is ill.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise BadInput(f"{name} is a folder, which has no revision {revision}", fix="leave --revision out")
        return Found(folder=Path(name))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BadInput(f"no such folder: {name}", fix="give a model's folder, or its name on the Hub: owner/name")
    from huggingface_hub import snapshot_download

    hub = HubSource(repository=name, revision=revision or "main", files=FILES if weights else SETTINGS)
    with explained(hub, MODEL):
        folder = Path(
            snapshot_download(name, revision=hub.revision, allow_patterns=list(hub.files), ignore_patterns=["*/*"])
        )
    if not (folder / CONFIG).is_file():
        raise BadInput(f"model {name} on the Hub has no {CONFIG}", fix="choose a model in transformers' format")
    return Found(folder=folder, commit=folder.name)  # snapshots/COMMIT, by which branches share files
