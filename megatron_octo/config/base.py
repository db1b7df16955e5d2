"""What all settings classes share: strict JSON, a fingerprint, and one way to refuse a value."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

from megatron_octo.errors import BadInput, SettingsError


class Settings:
    """Base of every settings class; it adds no field. Unknown keys in JSON are errors."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


def require(condition: bool, what: str, *, fix: str) -> None:
    """Raise SettingsError(`what`, `fix`) unless `condition` holds."""
    if not condition:
        raise SettingsError(what, fix=fix)


def require_positive(settings: Settings, section: str, *names: str) -> None:
    """Raise SettingsError unless each named field is above 0; `section` prefixes it in the message."""
    for name in names:
        value = getattr(settings, name)
        require(value > 0, f"{section}{name} {value} is not above 0", fix="give a number of at least 1")


def require_name(name: str) -> None:
    """Raise SettingsError unless `name` can be a folder of its own under OCTO_RUNS."""
    require(
        bool(name) and name not in (".", "..") and "/" not in name,
        f"name {name!r} cannot be a folder's name",
        fix="give a name without '/'",
    )


def to_dict(settings: Settings) -> dict[str, Any]:
    """Settings as plain JSON values; `from_dict` is its inverse."""
    value: dict[str, Any] = _adapter(type(settings)).dump_python(settings, mode="json")  # type: ignore[arg-type]
    return value


def from_dict[S: "Settings"](kind: type[S], value: Any, *, origin: str, strict: bool = False) -> S:
    """Settings of class `kind` from plain JSON values; `strict`, a text is never taken for a number or a yes.

    Raises:
        BadInput: an unknown key, a wrong type, or values that contradict each other. `origin` (a
            file name, say) is named in the message.
    """
    from pydantic import ValidationError

    adapter = _adapter(kind)  # type: ignore[arg-type]
    try:
        return adapter.validate_json(json.dumps(value), strict=True) if strict else adapter.validate_python(value)
    except ValidationError as error:
        lines = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadInput(f"{origin} holds no valid {kind.__name__}:\n{lines}", fix="correct the named fields") from None


@functools.cache
def _adapter(kind: type[Settings]) -> Any:
    """Pydantic's view of a settings class. To make one is slow, and a stage asks for its own a dozen times."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def fingerprint(settings: Settings) -> str:
    """A SHA-256 that changes when any field does."""
    return hashlib.sha256(json.dumps(to_dict(settings), sort_keys=True).encode()).hexdigest()


def read_settings[S: "Settings"](kind: type[S], path: Path) -> S:
    """Settings from a JSON file that `to_dict` made."""
    from megatron_octo.rundir import read_json

    return from_dict(kind, read_json(path), origin=str(path))
