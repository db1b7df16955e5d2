"""All that a user sees: log lines, progress, tables. No other module prints.

Logs and progress go to stderr; machine output (`emit_json`) goes to stdout. In a process group only
rank 0 speaks, except for warnings and errors, which carry their rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

QUIET_PROGRESS_EVERY_S = 30.0
WIDEST_NAME = 48  # of a table's first column, which is not broken up to there


def logger(name: str) -> logging.Logger:
    """Return the logger of a module; `configure` gives it its handler."""
    return logging.getLogger(name)


def rank() -> int:
    """This process's rank as torchrun or srun states it, 0 outside of a process group."""
    return int(os.environ.get("RANK", "0"))


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if rank() == 0:
            return True
        if record.levelno < logging.WARNING:
            return False
        record.msg = f"[rank {rank()} on {socket.gethostname()}] {record.msg}"
        return True


def configure(*, verbose: bool = False) -> None:
    """Send this package's log lines to stderr, one format everywhere. Called once, by the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_RankFilter())
    octo = logging.getLogger("megatron_octo")
    octo.handlers[:] = [handler]
    octo.setLevel(logging.DEBUG if verbose else logging.INFO)
    octo.propagate = False
    if not verbose:  # what torch, megatron and transformers say of each other's age is not the user's to mend
        warnings.filterwarnings("ignore")


def emit_json(value: Any) -> None:
    """Print one JSON document on stdout, for programs."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def emit(text: str) -> None:
    """Print text that is the answer to the command (a plan, a table) on stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout; plain where rich is missing, as `octo doctor` may have to say."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        lines = ("\t".join(map(str, row)) for row in rows)
        emit("\n".join([title, "\t".join(columns), *lines]))
        return

    out = Table(title=title, title_justify="left")
    cells = [[str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        whole = index == 0 and all(len(row[0]) <= WIDEST_NAME for row in cells)
        out.add_column(column, overflow="fold", no_wrap=whole)
    for row in cells:
        out.add_row(*row)
    Console().print(out)


def tree(title: str, nodes: Mapping[str, Any]) -> None:
    """Print nested lines, {line: {line below it: {...}}}, on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    def grow(above: Tree, below: Mapping[str, Any]) -> Tree:
        for line, children in below.items():
            grow(above.add(escape(line)), children)
        return above

    Console().print(grow(Tree(escape(title)), nodes))


def progress[T](items: Iterable[T], *, total: int | None, title: str) -> Iterator[T]:
    """Yield `items` while showing how far they are: a bar on a terminal, a line every 30 s elsewhere."""
    if sys.stderr.isatty() and rank() == 0:
        from rich.console import Console
        from rich.progress import track

        yield from track(items, total=total, description=title, console=Console(stderr=True))
        return
    log, last = logger(__name__), time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= QUIET_PROGRESS_EVERY_S:
            share = f" of {total:,} ({100 * done / total:.1f}%)" if total else ""
            log.info("%s: %s%s", title, f"{done:,}", share)
            last = time.monotonic()


@contextlib.contextmanager
def meter(title: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """Yield a function of (how much more is done, a remark): a bar on a terminal, a line every 30 s elsewhere.

    `total` is what all of it adds up to.
    """
    if sys.stderr.isatty() and rank() == 0:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, remark="")
            yield lambda more, remark: bar.update(task, advance=more, remark=remark)
        return
    log, began, last, done = logger(__name__), time.monotonic(), time.monotonic(), 0.0

    def show(more: float, remark: str) -> None:
        nonlocal done, last
        done += more
        now = time.monotonic()
        if now - last >= QUIET_PROGRESS_EVERY_S and 0 < done <= total:
            left = duration((now - began) * (total - done) / done)
            log.info("%s: %.1f%%, %s, about %s left", title, 100 * done / total, remark, left)
            last = now

    yield show


@contextlib.contextmanager
def byte_meter(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """As `meter`, of bytes: yield a function of how many more are done."""
    done = 0
    with meter(title, total) as show:

        def more(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            show(num_bytes, f"{size(done)} of {size(total)}")

        yield more


def duration(seconds: float) -> str:
    """`2d04h`, `3h05m`, `4m10s` or `7.3s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s"


def size(length: float) -> str:
    """A number of bytes for people."""
    if length < 1 << 20:
        return f"{length:,.0f} bytes"
    return f"{length / 2**30:,.1f} GiB" if length >= 100 << 20 else f"{length / 2**20:,.1f} MiB"
