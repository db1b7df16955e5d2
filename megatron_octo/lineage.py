"""Who descends from whom: base -> stable -> branch -> Hugging Face export -> RL.

Each folder that holds weights holds a `lineage.json` of this shape, its parents' nested inside, so
the file tells the whole descent even when the parents are gone. The terms of the base go along: `copy_licence`.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_octo import __version__
from megatron_octo.errors import BadInput
from megatron_octo.rundir import read_object, sha256, write_json

FILE = "lineage.json"
LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
Kind = Literal["base", "import", "train", "export", "rl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """One link of the descent."""

    name: str
    """The run's or the model's name."""
    kind: Kind
    """What made it."""
    weights_sha256: str
    """Hash of the weight files (`rundir.sha256_folder`); empty while a run has not saved yet."""
    step: int | None = None
    """Optimizer step of the save; None where there is none."""
    tokens: int = 0
    """Tokens this link itself trained on."""
    recipe_sha256: str = ""
    """Fingerprint of the settings, of a training run; SHA-256 of model.json, of an import."""
    data: tuple[tuple[str, str], ...] = ()
    """(source, identity of its data set) of all that it reads."""
    code: str = ""
    """What trained it, as `code_version` names it."""
    origin: str = ""
    """Where it was downloaded from: `owner/name@commit` on the Hugging Face Hub; empty for a folder of one's own."""
    parent: Lineage | None = None

    def chain(self) -> list[Lineage]:
        """This link and its ancestors, the oldest first."""
        return [*(self.parent.chain() if self.parent else []), self]


def read(folder: Path) -> Lineage:
    """The lineage of the weights in `folder`.

    Raises:
        BadInput: there is none, or a damaged one.
    """
    path = folder / FILE
    try:
        return _from_dict(read_object(path))
    except (AttributeError, TypeError) as error:
        raise BadInput(f"{path} is no lineage: {error}", fix="take another folder, or make this one again") from None


def read_if_present(folder: Path) -> Lineage | None:
    """The lineage of the weights in `folder`, None for a folder that was not made by us."""
    return read(folder) if (folder / FILE).exists() else None


def write(folder: Path, lineage: Lineage) -> None:
    """Write `lineage.json` into `folder`."""
    write_json(folder / FILE, asdict(lineage))


def copy_licence(source: Path, target: Path) -> None:
    """Copy the terms of a model to what descends from it: LICENSE and what belongs to it."""
    for path in (path for pattern in LICENCE_FILES for path in source.glob(pattern)):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


@functools.cache
def code_version() -> str:
    """This package's version and the beginning of a hash over its sources, changes not yet committed included."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {sha256(path)}\n".encode())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def _from_dict(value: dict[str, Any]) -> Lineage:
    parent, data = value.pop("parent", None), value.pop("data", ())
    link = Lineage(**value, data=tuple(map(tuple, data)), parent=_from_dict(parent) if parent else None)
    if not all(isinstance(each, str) for each in (link.name, link.kind, link.weights_sha256)):
        raise TypeError("name, kind and weights_sha256 are texts")
    return link
