"""Records -> token ids on disk: one source, in Megatron's indexed format with a manifest.

The files are cut into pieces, workers encode them, and this process writes what they return in the files' order. A
shard ends with a piece, and `progress.json` says after each shard where the next begins: a rerun goes on from there.
So the bytes depend on neither the number of workers nor on where an earlier run was killed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import orjson

from megatron_octo import console
from megatron_octo.config.base import Settings, read_settings, to_dict
from megatron_octo.config.data import PrepareConfig
from megatron_octo.data.encode import Bad, EncodedPiece, encoder, text_renderer
from megatron_octo.data.hub import HubFile
from megatron_octo.data.indexed import token_type
from megatron_octo.data.inputs import Inputs, file_state, find_inputs
from megatron_octo.data.manifest import (
    PREPARE,
    TOKEN_BYTES,
    FileRecord,
    FileState,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    read_manifest,
    stated_tokens,
    tokenizer_sha256,
    write_manifest,
)
from megatron_octo.data.read import Piece, input_files, pieces, record_name, records
from megatron_octo.data.shards import SHARD_FILES, ShardWriter
from megatron_octo.data.templates import BadRecord, column_names
from megatron_octo.data.tokenizer import Tokenizer, accelerated, load_tokenizer
from megatron_octo.data.workers import default_workers, ordered
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.rundir import LOCK, check_config, check_free, claim, is_done, lock, mark_done, sha256, write_json

PROGRESS, REJECTED, SETTINGS = "progress.json", "rejected.jsonl", "config.json"
VALIDATION = "validation_"
SAMPLE_DOCUMENTS = 200
SAMPLE_CHARACTERS = 1 << 20  # a tokenizer's own library may take more than a hundred times a text's length in memory
JUDGED_RECORDS = 1000  # before that many, a share of bad ones says little
WHAT_STOPS = ("on_bad_record", "most_bad_share")  # a source that stopped at a bad record may go on with others of these
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = console.logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress(Settings):
    """What is finished, and where to go on. Written after each shard."""

    tokenizer_sha256: str
    files: tuple[FileState, ...]
    """The inputs, in order."""
    hub: tuple[HubFile, ...] = ()
    """The same, where they are the Hub's: a branch may move, what is read may not."""
    file: int = 0
    """Index of the file to go on with."""
    start: int = 0
    """Where in it: `Piece.start`."""
    first: int = 1
    """Number of the record there: `Piece.first`."""
    shards: tuple[ShardRecord, ...] = ()
    validation: tuple[ShardRecord, ...] = ()
    hashed: tuple[FileRecord, ...] = ()
    """Files whose hash is known already."""
    num_records: int = 0
    rejected: int = 0
    filtered: int = 0
    text_bytes: int = 0
    control_texts: tuple[tuple[str, int], ...] = ()
    rejected_bytes: int = 0
    """Length of rejected.jsonl."""
    packages: tuple[str, ...] = ()
    """What wrote the shards, with versions."""


def prepare(config: PrepareConfig, *, num_workers: int | None = None, keep_empty: bool = False) -> Manifest:
    """Write the shards and the manifest of one source; a finished one is only read, an unfinished one goes on.

    Args:
        num_workers: processes that encode; None for one a core.
        keep_empty: take texts without letters as Megatron's own tool does, not as bad records.

    Raises:
        BadInput: an input is missing, damaged, or changed meanwhile; a record is bad, or with `skip` too many are;
            the tokenizer lacks a control id that is asked for; the output was made otherwise. Finished shards stay.
        OctoError: the disk is full, or a worker died. Finished shards stay.
    """
    if is_prepared(config):
        log.info("prepare %s: skipped, %s is there", config.name, config.output)
        (config.output / PROGRESS).unlink(missing_ok=True)  # of an attempt killed between its last two writes
        return read_manifest(config.output)
    tokenizer, inputs = check(config)
    new = not config.output.exists()
    try:
        with lock(config.output):
            claim(config.output, to_dict(config), may_differ=WHAT_STOPS)
            _say_tokens(config, tokenizer)
            manifest = _write(config, tokenizer, inputs, num_workers or default_workers(), keep_empty=keep_empty)
            _finish(config, manifest)
    except BaseException as error:
        if new and not (config.output / PROGRESS).exists():
            shutil.rmtree(config.output, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OctoError(
                f"prepare {config.name}: no room on the disk of {config.output}",
                fix="free some, then run it again: it goes on after the last finished shard",
            ) from error
        raise
    return manifest


def check_output(config: PrepareConfig) -> bool:
    """Whether the output is finished; one that was begun goes on. Changes nothing.

    Raises:
        BadInput: it was made with other settings, by something else, or another process is making it.
    """
    folder = config.output
    check_free(folder)
    done = is_done(folder)
    check_config(
        folder,
        to_dict(config),
        fix="choose another output folder, or delete this one",
        may_differ=() if done else WHAT_STOPS,
    )
    if done:
        return True
    if (
        folder.exists()
        and not (folder / SETTINGS).exists()
        and any(p.name != LOCK and p.suffix != ".tmp" for p in folder.iterdir())
    ):
        raise BadInput(
            f"output {folder} exists and no stage wrote it", fix="choose another output folder, or delete this one"
        )
    return False


def is_prepared(config: PrepareConfig) -> bool:
    """Whether the output is there, made with these settings, this tokenizer and this input; changes nothing.

    The input may be gone by now; what is still there must be what it was.

    Raises:
        BadInput: it was made otherwise, or another process is making it.
    """
    if not check_output(config):
        return False
    manifest = read_manifest(config.output)
    if config.tokenizer.exists() and tokenizer_sha256(config.tokenizer) != manifest.tokenizer.sha256:
        raise BadInput(
            f"prepared data set {config.output} was made with another tokenizer than {config.tokenizer} holds now",
            fix=f"delete it and {PREPARE}",
        )
    _check_inputs(config, manifest)
    return True


def _check_inputs(config: PrepareConfig, manifest: Manifest) -> None:
    """Refuse a finished data set if a file of its input is new, or holds something else than it did.

    Only a file whose time of writing changed is hashed.

    Raises:
        BadInput: so it is.
    """
    records = {each.file.path: each for each in manifest.sources}
    if config.input is None or not any(path.exists() for path in records):
        return
    for path in input_files(config.input):
        state, record = file_state(path), records.get(path)
        if record is None:
            what = f"{path} is new"
        elif state == record.file:
            continue
        else:
            log.info("prepare %s: %s was written again; comparing its hash", config.name, path)
            if state.size_bytes == record.file.size_bytes and sha256(path) == record.sha256:
                continue
            what = f"{path} holds something else"
        raise BadInput(
            f"{what} since {config.output} was prepared from it",
            fix=f"delete {config.output} and {PREPARE}; or choose another output",
        )


def check(config: PrepareConfig) -> tuple[Tokenizer, Inputs]:
    """The tokenizer and the files of a source that is to be prepared; changes nothing.

    Raises:
        BadInput: an input or the tokenizer is missing, or the tokenizer lacks a control id that is asked for.
    """
    tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    for name, wanted, token, index in (
        ("bos", config.bos, config.bos_token, tokenizer.bos_id),
        ("eos", config.eos, config.eos_token, tokenizer.eos_id),
    ):
        if wanted and index is None:
            raise BadInput(
                f"source {config.name} asks for {name}, and the tokenizer {config.tokenizer} has no "
                f"{token or f'{name}_token'}",
                fix=f"set {name}=False, or name one of its tokens: {name}_token in the recipe or tokenizer_config.json",
            )
    begun = read_settings(Progress, config.output / PROGRESS) if (config.output / PROGRESS).exists() else None
    token_bytes = TOKEN_BYTES[token_type(tokenizer.vocab_size)]
    return tokenizer, find_inputs(
        config, begun.hub if begun else (), begun.file if begun else 0, token_bytes=token_bytes
    )


def _say_tokens(config: PrepareConfig, tokenizer: Tokenizer) -> None:
    """Which ids begin and end the documents; a warning where the tokenizer's folder states another end."""
    begin = f"{tokenizer.bos_token} ({tokenizer.bos_id})" if config.bos else "no id of their own"
    end = f"{tokenizer.eos_token} ({tokenizer.eos_id})" if config.eos else "none"
    log.info("prepare %s: documents begin with %s and end with %s", config.name, begin, end)
    _, stated = stated_tokens(config.tokenizer)
    if config.eos and not config.eos_token and stated not in (None, tokenizer.eos_token):
        log.warning(
            "prepare %s: tokenizer_config.json states %s, which ends a turn of a chat, not a document; "
            "eos_token=%r in the recipe would end documents with it",
            config.name,
            stated,
            stated,
        )


def _write(
    config: PrepareConfig, tokenizer: Tokenizer, inputs: Inputs, num_workers: int, *, keep_empty: bool
) -> Manifest:
    """All shards from where an earlier attempt stopped, then the manifest."""
    folder, began = config.output, time.monotonic()
    progress = _resume(config, tokenizer, inputs)
    # the workers are the parallelism; a library's own threads would not survive their fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = accelerated(tokenizer, _sample(config, inputs.open(progress.file)))
    progress = replace(progress, packages=tuple(sorted({*progress.packages, *_packages(tokenizer)})))
    encode = encoder(config, tokenizer, keep_empty=keep_empty)
    with ThreadPoolExecutor(1) as hashing:
        # its thread begins with the first file, after the workers have been forked
        reading = _Reading(config, inputs, progress, hashing)
        shards = _Shards(config, tokenizer, progress)
        with (
            contextlib.closing(shards),
            console.meter(f"prepare {config.name}", reading.total_bytes) as show,
            contextlib.closing(ordered(encode, reading.pieces(), num_workers)) as results,
        ):
            for result, place in zip(results, reading.places(), strict=True):
                shards.add(result, place)
                show(place.stored_bytes, f"{shards.tokens:,} tokens")
                if shards.full:
                    _save(folder, shards.end_shard(reading))
            shards.check_share(at_end=True)
            _save(folder, shards.end_shard(reading))
        done = replace(shards.progress, hashed=reading.hashes(wait=True))
    manifest = _manifest(config, tokenizer, done)
    seconds = time.monotonic() - began
    log.info(
        "prepare %s: %s documents, %s tokens (%.1f each), %s rejected, %s filtered; %s tokens/s",
        config.name,
        f"{manifest.documents:,}",
        f"{manifest.tokens:,}",
        manifest.tokens / manifest.documents,
        f"{manifest.rejected:,}",
        f"{manifest.filtered:,}",
        f"{(manifest.tokens - sum(s.tokens for s in progress.shards)) / seconds:,.0f}",
    )
    return manifest


def _packages(tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(f"{name} {metadata.version(name)}" for name in ("megatron_octo", tokenizer.engine))


def _save(folder: Path, progress: Progress) -> None:
    write_json(folder / PROGRESS, to_dict(progress))


def _finish(config: PrepareConfig, manifest: Manifest) -> None:
    write_manifest(config.output, manifest)
    mark_done(config.output)
    (config.output / PROGRESS).unlink()


def _resume(config: PrepareConfig, tokenizer: Tokenizer, inputs: Inputs) -> Progress:
    """Where to go on; what a killed attempt left unfinished is removed.

    Raises:
        BadInput: the tokenizer, or a file that finished shards took from, is not that of the earlier attempt; or that
            one left records out and now none may be.
    """
    folder = config.output
    progress = Progress(tokenizer_sha256=tokenizer.sha256, files=inputs.states, hub=inputs.hub)
    if (folder / PROGRESS).exists():
        progress = _on_these_files(config, read_settings(Progress, folder / PROGRESS), inputs)
        if progress.tokenizer_sha256 != tokenizer.sha256:
            raise BadInput(
                f"the tokenizer {config.tokenizer} changed since {folder} was begun",
                fix=f"delete {folder} and begin again",
            )
        if progress.rejected and config.on_bad_record == "stop":
            raise BadInput(
                f"{folder} was begun with on_bad_record='skip' and left out {progress.rejected:,} records",
                fix=f"go on with on_bad_record='skip', or delete {folder} and begin again",
            )
        log.info("prepare %s: goes on after %s finished shards", config.name, len(progress.shards))
    finished = {shard.prefix for shard in (*progress.shards, *progress.validation)}
    for path in folder.iterdir():
        if path.suffix == ".tmp" or (path.suffix in SHARD_FILES and path.stem not in finished):
            path.unlink()
    if (folder / REJECTED).exists():
        os.truncate(folder / REJECTED, progress.rejected_bytes)
    return progress


def _on_these_files(config: PrepareConfig, progress: Progress, inputs: Inputs) -> Progress:
    """`progress` with the files as they are now: those that no finished shard took from may have been corrected.

    Raises:
        BadInput: another one changed.
    """
    taken = progress.file + (progress.start > 0)
    before, now = progress.files[:taken], inputs.states[:taken]
    if before != now:
        changed = [str(a.path) for a, b in itertools.zip_longest(before, now) if a != b and a is not None]
        raise BadInput(
            f"{', '.join(changed[:3])} changed since {config.output} was begun",
            fix=f"put it back as it was, or delete {config.output} and begin again",
        )
    hashed = tuple(each for each in progress.hashed if each.file in inputs.states)
    return replace(progress, files=inputs.states, hub=inputs.hub, hashed=hashed)


def _sample(config: PrepareConfig, path: Path) -> list[str]:
    """Some texts of a file, on which tokenizers are compared."""
    render = text_renderer(config)
    texts: list[str] = []
    room = SAMPLE_CHARACTERS
    for piece in itertools.islice(_read(config, path), 4):
        for _, record in records(piece):
            with contextlib.suppress(BadRecord):
                if not isinstance(record, BadRecord) and (rendered := render(record)):
                    texts.append(rendered.text[:room])
                    room -= len(texts[-1])
            if len(texts) == SAMPLE_DOCUMENTS or not room:
                return texts
    return texts


def _read(config: PrepareConfig, path: Path, *, start: int = 0, first: int = 1) -> Iterator[Piece]:
    """The pieces of a file, of a table those columns that are used."""
    names = column_names(
        config.template,
        columns=config.columns,
        format_string=config.format_string,
        chat_models=bool(config.chat_models),
    )
    return pieces(
        path,
        start=start,
        first=first,
        columns=[*names, *([config.id_column] if config.id_column else [])],
        piece_bytes=config.piece_bytes,
        longest=config.longest_record_bytes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a piece came from, and where the next one begins."""

    path: Path
    file: int
    start: int
    first: int
    stored_bytes: float
    """Bytes of the file that it stands for, as stored."""


class _Reading:
    """The pieces of all files from where to go on; hashes the files meanwhile, and sees whether one changes."""

    def __init__(self, config: PrepareConfig, inputs: Inputs, progress: Progress, hashing: ThreadPoolExecutor) -> None:
        self._config, self._inputs, self._progress, self._hashing = config, inputs, progress, hashing
        self._places: list[_Place] = []
        self._known = {each.file.path: each for each in progress.hashed}
        self._pending: dict[Path, Future[str]] = {}
        self.total_bytes = sum(each.size_bytes for each in progress.files[progress.file :])

    def pieces(self) -> Iterator[Piece]:
        """Read."""
        for index in range(self._progress.file, len(self._inputs.states)):
            yield from self._file(index)

    def places(self) -> Iterator[_Place]:
        """The places of the pieces, in order, as far as they have been read."""
        taken = 0
        while taken < len(self._places):
            yield self._places[taken]
            taken += 1
            if taken == 1000:  # forget them
                del self._places[:taken]
                taken = 0

    def hashes(self, *, wait: bool = False) -> tuple[FileRecord, ...]:
        """The files hashed so far, in order; with `wait` all of them."""
        for state in self._inputs.states:
            future = self._pending.get(state.path)
            if state.path not in self._known and wait and future is None:  # read by an earlier attempt
                future = self._hashing.submit(sha256, state.path)
            if state.path not in self._known and future and (wait or future.done()):
                self._know(state, future.result())
        return tuple(self._known[state.path] for state in self._inputs.states if state.path in self._known)

    def _file(self, index: int) -> Iterator[Piece]:
        path, state = self._inputs.open(index), self._inputs.states[index]
        if known := self._inputs.known(index):
            self._known[state.path] = known
        elif state.path not in self._known:
            self._pending[state.path] = self._hashing.submit(sha256, path)
        here = index == self._progress.file
        start, first = (self._progress.start, self._progress.first) if here else (0, 1)
        shown = 0.0
        for piece in _read(self._config, path, start=start, first=first):
            stored = min(float(len(piece.data)), state.size_bytes - shown)
            shown += stored
            self._places.append(
                _Place(
                    path=state.path,
                    file=index,
                    start=piece.end,
                    first=piece.first + piece.count,
                    stored_bytes=stored,
                )
            )
            yield piece
        if path != state.path and state.path in self._pending:  # it is about to be deleted
            self._know(state, self._pending[state.path].result())
        self._inputs.close(index)

    def _know(self, state: FileState, digest: str) -> None:
        self._known[state.path] = FileRecord(file=state, sha256=digest)


class _Shards:
    """Takes results in order and keeps the account of them."""

    def __init__(self, config: PrepareConfig, tokenizer: Tokenizer, progress: Progress) -> None:
        self._config, self.progress = config, progress
        dtype = token_type(tokenizer.vocab_size)
        self._train = ShardWriter(config.output, "", dtype, number=len(progress.shards))
        self._validation = ShardWriter(config.output, VALIDATION, dtype, number=len(progress.validation))
        self._controls = Counter(dict(progress.control_texts))
        self._rejected = (config.output / REJECTED).open("ab") if config.on_bad_record == "skip" else None
        self._place: _Place | None = None
        self._bad: dict[str, tuple[int, str]] = {}
        self.num_records, self.rejected = progress.num_records, progress.rejected
        self.filtered, self.text_bytes = progress.filtered, progress.text_bytes
        self.tokens = sum(shard.tokens for shard in progress.shards)

    @property
    def full(self) -> bool:
        """Whether the open shard is to end."""
        return max(self._train.tokens, self._validation.tokens) >= self._config.shard_tokens

    def add(self, result: EncodedPiece, place: _Place) -> None:
        """Write what a piece became.

        Raises:
            BadInput: a record is bad and bad ones are not skipped, or too many are.
        """
        for bad in result.bad:
            self._reject(bad, place.path)
        self._train.add(result.train)
        self._validation.add(result.validation)
        self._controls.update(result.control_texts)
        self.num_records += result.num_records
        self.rejected += len(result.bad)
        self.filtered += result.filtered
        self.text_bytes += result.train.text_bytes
        self.tokens += result.train.ids.size
        self._place = place
        self.check_share(at_end=False)

    def check_share(self, *, at_end: bool) -> None:
        """Refuse a source with too many bad records, or at its end one without documents.

        Raises:
            BadInput: so it is.
        """
        config, where = self._config, self._config.input
        if (at_end or self.num_records >= JUDGED_RECORDS) and self.rejected > config.most_bad_share * self.num_records:
            raise BadInput(
                f"source {config.name}: {self.rejected:,} of {self.num_records:,} records in {where} are bad, more "
                f"than most_bad_share {config.most_bad_share:g}: {self._reasons()}",
                fix="choose the template whose fields the records have, correct the file, or raise most_bad_share",
            )
        if at_end and not self.tokens:
            raise BadInput(
                f"source {config.name}: no documents among {self.num_records:,} records in {where}",
                fix="choose other text; or lower validation_share, if that took them all",
            )

    def end_shard(self, reading: _Reading) -> Progress:
        """Finish the open shards; the progress up to here."""
        shards = [shard for shard in (self._train.close(),) if shard]
        validation = [shard for shard in (self._validation.close(),) if shard]
        if self._rejected:
            self._rejected.flush()
            os.fsync(self._rejected.fileno())
        self.progress = replace(
            self.progress,
            shards=(*self.progress.shards, *shards),
            validation=(*self.progress.validation, *validation),
            hashed=reading.hashes(),
            num_records=self.num_records,
            rejected=self.rejected,
            filtered=self.filtered,
            text_bytes=self.text_bytes,
            control_texts=tuple(sorted(self._controls.items())),
            rejected_bytes=self._rejected.tell() if self._rejected else 0,
        )
        if self._place:
            place = self._place
            self.progress = replace(self.progress, file=place.file, start=place.start, first=place.first)
        return self.progress

    def _reasons(self) -> str:
        """The commonest reasons of this attempt, each with the first record that has it."""
        common = sorted(self._bad.items(), key=lambda item: -item[1][0])[:3]
        return "; ".join(f"{reason} ({count:,}, the first at {where})" for reason, (count, where) in common)

    def close(self) -> None:
        """Let go of the files."""
        if self._rejected:
            self._rejected.close()

    def _reject(self, bad: Bad, path: Path) -> None:
        kind = record_name(path)
        if self._rejected is None:
            raise BadInput(
                f"source {self._config.name}: {path}, {kind} {bad.number:,}: {bad.reason}",
                fix="correct the record; or leave such records out: `octo data prepare` with on_bad_record='skip'",
            )
        count, where = self._bad.get(bad.reason, (0, f"{path}, {kind} {bad.number:,}"))
        self._bad[bad.reason] = (count + 1, where)
        row = {"path": str(path), kind: bad.number, "reason": bad.reason, "record": bad.raw}
        self._rejected.write(orjson.dumps(row) + b"\n")


def _manifest(config: PrepareConfig, tokenizer: Tokenizer, done: Progress) -> Manifest:
    return Manifest(
        config=replace(config, output=Path()),
        packages=done.packages,
        documents=sum(shard.documents for shard in done.shards),
        tokens=sum(shard.tokens for shard in done.shards),
        text_bytes=done.text_bytes,
        rejected=done.rejected,
        filtered=done.filtered,
        control_texts=done.control_texts,
        dtype=token_type(tokenizer.vocab_size),
        tokenizer=TokenizerRecord(
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos_token=tokenizer.bos_token,
            bos_id=tokenizer.bos_id,
            eos_token=tokenizer.eos_token,
            eos_id=tokenizer.eos_id,
        ),
        sources=done.hashed,
        shards=done.shards,
        validation=done.validation,
    )
