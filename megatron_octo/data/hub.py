"""Files of a data set on the Hugging Face Hub: whether we may read them, and one after another here.

`hub_listing.plan_downloads`, `check_access`; then for each file `fetch`, read, `release`. huggingface_hub lists and
authorizes, but does not download: since its 1.0 a download that was killed begins anew. HF_ENDPOINT, HF_TOKEN, HF_HOME
and HF_HUB_OFFLINE mean what they mean there. A token is never shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from megatron_octo import console
from megatron_octo.config.base import Settings, require
from megatron_octo.config.data import HubSource, PrepareConfig
from megatron_octo.errors import BadInput, OctoError

PAGE = "https://huggingface.co/datasets"  # people visit the Hub itself, whatever HF_ENDPOINT is
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
MOST_IDLE_TRIES = 5  # requests in a row that brought nothing
FIRST_WAIT_S = 1.0
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
log = console.logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What messages say of a kind of repository."""

    noun: str
    page: str
    """Address of its pages, without the repository."""
    option: str
    """What `hf download` wants to be told."""
    use: str
    """What to do with files that were downloaded elsewhere."""


DATA_SET = Kind(
    noun="data set", page=PAGE, option=" --repo-type dataset", use="name them with `input` in place of `hub`"
)
MODEL = Kind(noun="model", page="https://huggingface.co", option="", use="give FOLDER in place of the model's name")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFile(Settings):
    """A file of a data set, at one commit."""

    repository: str
    """`owner/name`."""
    commit: str
    """The commit's whole hash."""
    path: str
    """The file's path in the repository."""
    size_bytes: int
    """Its length."""
    sha256: str | None = None
    """Hash of its content; None for a small file that git itself keeps."""
    git_id: str
    """git's id: of the content, or where there is `sha256`, of the pointer to it."""

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        require(
            bool(parts) and not self.path.startswith("/") and ".." not in parts and "\\" not in self.path,
            f"data set {self.repository} has a file called {self.path!r}",
            fix="choose patterns that leave it out",
        )


def check_access(config: PrepareConfig, files: Sequence[HubFile]) -> None:
    """Refuse a source of which the Hub would not give us these files, those still to be read; changes nothing.

    Raises:
        BadInput: the Hub cannot be reached, or does not give us them.
        OctoError: the Hub is ill.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT, MAX_HTTP_DOWNLOAD_SIZE

    if not files:
        return
    hub = config.hub or _hub_of(files[0])
    with explained(hub):
        endpoint = HfApi().endpoint
        first = files[0]
        url = hf_hub_url(
            first.repository, first.path, repo_type="dataset", revision=first.commit, endpoint=endpoint
        )  # listing a gated set is allowed; this is what is not
        get_hf_file_metadata(url, timeout=HF_HUB_ETAG_TIMEOUT, endpoint=endpoint)
    largest = max(files, key=lambda each: each.size_bytes)
    if largest.size_bytes > MAX_HTTP_DOWNLOAD_SIZE:
        raise BadInput(
            f"{_name(largest)} has {console.size(largest.size_bytes)}; the Hub serves files above "
            f"{console.size(MAX_HTTP_DOWNLOAD_SIZE)} only to its own programs",
            fix=_elsewhere(hub),
        )


def downloads_folder(config: PrepareConfig) -> Path:
    """Where a source's downloads lie while they are read: beside its output."""
    return config.output.with_name(f"{config.output.name}.downloads")


def missing_bytes(file: HubFile, folder: Path) -> int:
    """What `fetch` would still have to download."""
    return max(0, file.size_bytes - _length(folder / file.path) - _length(_partial(file, folder)))


def fetch(file: HubFile, folder: Path) -> Path:
    """Download a file to its path below `folder`, and return that; it appears there only when it is whole.

    A part that an earlier process left is continued. A file that is there already is only verified. May be called
    from a thread.

    Raises:
        BadInput: the Hub cannot be reached, or no longer gives us the file.
        OctoError: the connection breaks again and again (the part stays), or what comes is not what the Hub listed.
    """
    target = folder / file.path
    if target.is_file():
        if _is_whole(file, target):
            return target
        log.warning("%s is not what the Hub lists; downloading it again", target)
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(file, folder)
    continued = _download(file, partial)
    whole = _is_whole(file, partial)
    if continued and not whole:
        log.warning("%s: a part that was there is damaged; downloading all of it again", _name(file))
        partial.unlink()
        _download(file, partial)
        whole = _is_whole(file, partial)
    if not whole:
        partial.unlink()
        raise OctoError(
            f"the download of {_name(file)} is not what the Hub lists: its hash differs",
            fix="run it again; if that does not help, something on the way (a proxy, HF_ENDPOINT) changes files",
        )
    partial.replace(target)
    return target


def release(file: HubFile, folder: Path) -> None:
    """Remove what `fetch` left of a file, and the folders that this empties, `folder` included."""
    target = folder / file.path
    target.unlink(missing_ok=True)
    _partial(file, folder).unlink(missing_ok=True)
    for parent in target.parents:
        if not parent.is_relative_to(folder):
            break
        with contextlib.suppress(OSError):  # not empty, or gone
            parent.rmdir()


def _download(file: HubFile, partial: Path) -> bool:
    """Bring `partial` to the file's length; whether it was put together from several answers."""
    began, answers, idle = time.monotonic(), 0, 0
    with partial.open("ab") as out:
        there = out.tell()
        log.info(
            "download %s: %s%s",
            _name(file),
            console.size(file.size_bytes),
            f", of which {console.size(there)} are here" if there else "",
        )
        if there > file.size_bytes:
            _empty(out)
        while (start := out.tell()) < file.size_bytes:
            problem = _append(file, out)
            answers += 1
            if out.tell() >= file.size_bytes:
                break
            idle = 0 if out.tell() > start else idle + 1
            if idle > MOST_IDLE_TRIES:
                raise OctoError(
                    f"the download of {_name(file)} stopped at {console.size(out.tell())} of "
                    f"{console.size(file.size_bytes)}: {problem}",
                    fix="run it again: it goes on from there",
                )
            log.warning("download %s: %s at %s; going on", _name(file), problem, console.size(out.tell()))
            time.sleep(FIRST_WAIT_S * 2**idle)
        out.flush()
        os.fsync(out.fileno())
    seconds = time.monotonic() - began
    rate = (file.size_bytes - there) / max(seconds, 1e-3)
    log.info("download %s: done in %s, %s/s", _name(file), console.duration(seconds), console.size(rate))
    return there > 0 or answers > 1


def _append(file: HubFile, out: BinaryIO) -> str:
    """Ask once for what is missing, and write what comes; why it is not all, if it is not."""
    import httpx
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    start = out.tell()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(
        file.repository, file.path, repo_type="dataset", revision=file.commit, endpoint=HfApi().endpoint
    )  # anew each time: what it forwards to expires; httpx sends no token to another host
    shown = time.monotonic()
    with explained(_hub_of(file)):
        try:
            with get_session().stream(
                "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
            ) as answer:
                hf_raise_for_status(answer)
                if start and answer.status_code != httpx.codes.PARTIAL_CONTENT:
                    _empty(out)
                for chunk in answer.iter_bytes():  # no chunk_size: it would hold back what came before a break
                    out.write(chunk)
                    if out.tell() > file.size_bytes:
                        break
                    if time.monotonic() - shown >= console.QUIET_PROGRESS_EVERY_S:
                        shown = time.monotonic()
                        log.info("download %s: %.1f%%", _name(file), 100 * out.tell() / file.size_bytes)
            return "the answer ended too soon"
        except HfHubHTTPError as error:
            if error.response.status_code in PASSING_STATUS:
                return f"the Hub answers {error.response.status_code}"
            if error.response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                _empty(out)
                return "the Hub does not know that range"
            raise
        except httpx.RequestError as error:
            return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _empty(out: BinaryIO) -> None:
    out.seek(0)
    out.truncate()


def _is_whole(file: HubFile, path: Path) -> bool:
    if path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as content:
        if file.sha256:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
        blob = hashlib.file_digest(content, lambda: hashlib.sha1(b"blob %d\0" % file.size_bytes))  # git's own
        return blob.hexdigest() == file.git_id


def _partial(file: HubFile, folder: Path) -> Path:
    """The part of a download; its name says of which content."""
    target = folder / file.path
    return target.with_name(f".{target.name}.{(file.sha256 or file.git_id)[:12]}.part")


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextlib.contextmanager
def explained(hub: HubSource, kind: Kind = DATA_SET) -> Iterator[None]:
    """Turn what huggingface_hub raises into what a user can act on."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except OfflineModeIsEnabled:
        raise BadInput(
            f"{kind.noun} {hub.repository} is on the Hub, which is read only when online, and HF_HUB_OFFLINE is set",
            fix=f"unset HF_HUB_OFFLINE; or {_elsewhere(hub, kind)}",
        ) from None
    except HFValidationError:
        raise BadInput(f"{hub.repository!r} is no {kind.noun}'s name", fix="give it as owner/name") from None
    except GatedRepoError as error:
        raise _gated(hub, kind, error.server_message) from None
    except RepositoryNotFoundError:
        private = "or it is private and the token has no access" if _has_token() else "or it is private"
        raise BadInput(
            f"there is no {kind.noun} {hub.repository} on the Hub, {private}",
            fix=f"check the name at {kind.page}/{hub.repository}; if it is private, set HF_TOKEN to a token that may "
            "see it",
        ) from None
    except RevisionNotFoundError:
        raise BadInput(
            f"{kind.noun} {hub.repository} has no revision {hub.revision!r}",
            fix=f"choose a commit, tag or branch of {kind.page}/{hub.repository}/commits/main",
        ) from None
    except HfHubHTTPError as error:
        raise _refused(hub, kind, error.response.status_code, error.server_message) from error
    except (LocalEntryNotFoundError, httpx.RequestError) as found:  # the former is what a whole snapshot makes of them
        why = found.__cause__ if isinstance(found.__cause__, httpx.RequestError) else found
        raise BadInput(
            f"{kind.noun} {hub.repository} is on the Hub, which is read only when online, and {HfApi().endpoint} "
            f"cannot be reached: {type(why).__name__}: {why}",
            fix=f"go online (a proxy: HTTPS_PROXY; a mirror: HF_ENDPOINT); or {_elsewhere(hub, kind)}",
        ) from found
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{HfApi().endpoint} does not answer as the Hub does: {error}",
            fix="check HF_ENDPOINT, and whether a proxy asks to log in",
        ) from error


def _gated(hub: HubSource, kind: Kind, says: str | None) -> BadInput:
    page = f"{kind.page}/{hub.repository}"
    if _has_token():
        return BadInput(
            f"{kind.noun} {hub.repository} is gated, and the token's account has no access to it"
            f"{f' (the Hub: {says})' if says else ''}",
            fix=f"visit {page} as that account and accept the terms, or wait where the owner decides; a fine-grained "
            f"token also needs the right to read gated repositories ({TOKENS_PAGE})",
        )
    return BadInput(
        f"{kind.noun} {hub.repository} is gated: its owner wants terms accepted, and HF_TOKEN is not set",
        fix=f"visit {page} and accept the terms, make a token at {TOKENS_PAGE}, and set HF_TOKEN to it",
    )


def _refused(hub: HubSource, kind: Kind, status: int, says: str | None) -> OctoError:
    what = f"the Hub refuses {kind.noun} {hub.repository}: {status}{f', {says}' if says else ''}"
    if status == 401:
        return BadInput(
            f"{what}: it does not accept the token",
            fix=f"make another at {TOKENS_PAGE} and set HF_TOKEN to it; or unset it, if the {kind.noun} is public",
        )
    if status in PASSING_STATUS:
        return OctoError(what, fix="run it again later")
    return BadInput(what, fix=f"look at {kind.page}/{hub.repository} with the account of the token")


def _has_token() -> bool:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return "authorization" in build_hf_headers()


def _elsewhere(hub: HubSource, kind: Kind = DATA_SET) -> str:
    # there `*` stands for folders as well, and `**/` for at least one
    wanted = "".join(f" --include '{pattern.replace('**/', '*')}'" for pattern in hub.files)
    return (
        f"download the files where the Hub can be reached (`hf download {hub.repository}{kind.option} "
        f"--revision {hub.revision}{wanted} --local-dir FOLDER`), copy FOLDER here, and {kind.use}"
    )


def _hub_of(file: HubFile) -> HubSource:
    return HubSource(repository=file.repository, revision=file.commit, files=(file.path,))


def _name(file: HubFile) -> str:
    return f"{file.repository}/{file.path}"
