"""Which files of a data set on the Hub are read: those that patterns name, or those of a subset's split.

Where a split lies, the data set's card says (`configs`); else it is where `push_to_hub` puts it (SUBSET/SPLIT-*, or
data/SPLIT-*); else the Hub's own conversion to Parquet holds it (SUBSET/SPLIT/*.parquet at refs/convert/parquet).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from megatron_octo.config.data import HubSource
from megatron_octo.data.hub import PAGE, HubFile, explained
from megatron_octo.data.read import KINDS, can_read
from megatron_octo.errors import BadInput

CONVERTED = "refs/convert/parquet"
PARTIAL = "partial-"  # before the name of a split of which the Hub has converted the beginning only


def plan_downloads(hub: HubSource) -> list[HubFile]:
    """The files that `hub` names, in the order in which they are read; downloads nothing.

    Raises:
        BadInput: the Hub cannot be reached; the data set, the revision, the subset, the split or the files are not
            there or not for us; a file is of a kind that cannot be read.
        OctoError: the Hub is ill.
    """
    found: dict[str, HubFile] = {}
    with explained(hub):
        commit, configs = _about(hub, hub.revision)
        listing = _Listing(hub.repository, commit)
        listing, patterns = (listing, hub.files) if hub.files else _of_split(hub, listing, configs)
        for pattern in patterns:
            fitting = listing.files(pattern)
            if not fitting:
                raise _no_match(hub, listing, pattern)
            found.update({each.path: each for each in fitting})
    for path in found:
        if not can_read(PurePosixPath(path)):
            raise BadInput(
                f"data set {hub.repository}: {path} is of no kind that can be read",
                fix=f"choose patterns of files that end in {KINDS}",
            )
    return [found[path] for path in sorted(found)]


@dataclass(frozen=True, slots=True)
class _Listing:
    """What lies in a data set at one commit; a folder is asked for once."""

    repository: str
    commit: str
    _below: dict[str, list[Any]] = field(default_factory=dict)

    def files(self, pattern: str) -> list[HubFile]:
        """The files that fit a pattern."""
        folder, parts = _fixed_part(pattern), pattern.split("/")
        if folder not in self._below:
            self._below[folder] = self._tree(folder, recursive=True) or []
        fitting = [each for each in self._below[folder] if _is_file(each) and _fits(each.path.split("/"), parts)]
        return [
            HubFile(
                repository=self.repository,
                commit=self.commit,
                path=each.path,
                size_bytes=each.size,
                sha256=each.lfs.sha256 if each.lfs else None,
                git_id=each.blob_id,
            )
            for each in fitting
        ]

    def near(self, folder: str) -> list[str]:
        """The names in a folder, or in the nearest above it that there is; folders end in a slash."""
        while (there := self._tree(folder, recursive=False)) is None and folder:
            folder = folder.rpartition("/")[0]
        return [each.path if _is_file(each) else f"{each.path}/" for each in there or []]

    def folders(self, folder: str = "") -> list[str]:
        """The names of the folders in a folder."""
        there = self._tree(folder, recursive=False) or []
        return [PurePosixPath(each.path).name for each in there if not _is_file(each)]

    def _tree(self, folder: str, *, recursive: bool) -> list[Any] | None:
        """Files and folders below a folder, or None if there is no such folder."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            return list(
                HfApi().list_repo_tree(
                    self.repository, folder or None, recursive=recursive, revision=self.commit, repo_type="dataset"
                )
            )
        except RemoteEntryNotFoundError:
            return None


def _about(hub: HubSource, revision: str) -> tuple[str, Any]:
    """(the commit of a revision, `configs` of the data set's card)."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    about = HfApi().dataset_info(
        hub.repository, revision=revision, expand=["sha", "cardData"], timeout=HF_HUB_ETAG_TIMEOUT
    )
    return about.sha or revision, about.card_data.get("configs") if about.card_data else None


def _of_split(hub: HubSource, listing: _Listing, configs: Any) -> tuple[_Listing, Sequence[str]]:
    """Where a subset's split lies, and the patterns of its files there."""
    try:
        subsets, default = _of_card(configs)
    except (AttributeError, KeyError, TypeError):
        raise BadInput(
            f"the card of data set {hub.repository} is malformed at `configs`", fix=_name_files(hub)
        ) from None
    if subsets:
        splits = subsets[_subset(hub, list(subsets), default)]
        _check_split(hub, splits)
        return listing, splits[hub.split]
    pattern = f"{hub.subset or 'data'}/{hub.split}-*"
    return (listing, [pattern]) if listing.files(pattern) else _of_conversion(hub, pattern)


def _of_card(configs: Any) -> tuple[dict[str, dict[str, list[str]]], str]:
    """(the patterns of each split of each subset, the subset that is the default one).

    A card gives them as {split: paths}, as [{split, path}], or as paths of the split `train`; paths are one or a list.
    """
    subsets, default = dict[str, dict[str, list[str]]](), "default"
    for config in [configs] if isinstance(configs, dict) else configs or []:
        name, files = config.get("config_name", "default"), config.get("data_files")
        if isinstance(files, list) and files and isinstance(files[0], dict):
            files = {each["split"]: each["path"] for each in files}
        elif isinstance(files, str | list):
            files = {"train": files}
        if files:
            subsets[name] = {split: _paths(paths, config.get("data_dir")) for split, paths in files.items()}
        if config.get("default"):
            default = name
    return subsets, default


def _paths(paths: str | Sequence[str], folder: str | None) -> list[str]:
    return [str(PurePosixPath(folder or "", path)) for path in ([paths] if isinstance(paths, str) else paths)]


def _of_conversion(hub: HubSource, missing: str) -> tuple[_Listing, Sequence[str]]:
    """The files of a split as the Hub has converted them, which it does with the newest commit only."""
    from huggingface_hub.errors import RevisionNotFoundError

    what = f"data set {hub.repository} does not say where its split {hub.split} is: no `configs`, and no {missing}"
    if hub.revision != "main":
        raise BadInput(what, fix=_name_files(hub))
    try:
        commit, _ = _about(hub, CONVERTED)
    except RevisionNotFoundError:
        raise BadInput(f"{what}; nor has the Hub converted it", fix=_name_files(hub)) from None
    listing = _Listing(hub.repository, commit)
    subset = _subset(hub, listing.folders())
    splits = listing.folders(subset)
    if f"{PARTIAL}{hub.split}" in splits:
        raise BadInput(f"{what}; and the Hub has converted only its beginning", fix=_name_files(hub))
    _check_split(hub, splits)
    return listing, [f"{subset}/{hub.split}/*.parquet"]


def _subset(hub: HubSource, there: Sequence[str], default: str = "default") -> str:
    """The subset that is asked for; without such, the default or the only one."""
    if hub.subset in there:
        return hub.subset
    if not hub.subset and (default in there or len(there) == 1):
        return default if default in there else there[0]
    raise BadInput(
        f"data set {hub.repository} has no {f'subset {hub.subset}' if hub.subset else 'default subset'}",
        fix=f"choose `subset` among those there are: {', '.join(there)}",
    )


def _check_split(hub: HubSource, there: Iterable[str]) -> None:
    if hub.split not in there:
        raise BadInput(
            f"data set {hub.repository} has no split {hub.split}{f' in subset {hub.subset}' if hub.subset else ''}",
            fix=f"choose `split` among those there are: {', '.join(there)}",
        )


def _name_files(hub: HubSource) -> str:
    page = f"{PAGE}/{hub.repository}/tree/{hub.revision}"
    return f"give patterns of its files (`files`) in place of subset and split; see {page}"


def _no_match(hub: HubSource, listing: _Listing, pattern: str) -> BadInput:
    """The error of a pattern that fits nothing, with the nearest paths."""
    near = difflib.get_close_matches(pattern, listing.near(_fixed_part(pattern)), n=5, cutoff=0)
    return BadInput(
        f"data set {hub.repository} has no file {pattern!r} at revision {hub.revision} ({listing.commit[:12]})",
        fix=f"correct the pattern; the nearest there: {', '.join(near)}" if near else "correct the pattern",
    )


def _fixed_part(pattern: str) -> str:
    """The folder in front of a pattern's first wildcard."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, both as their parts: `**` stands for any folders, or none."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_fits(path[at:], pattern[1:]) for at in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _is_file(entry: Any) -> bool:
    from huggingface_hub.hf_api import RepoFile

    return isinstance(entry, RepoFile)
