"""The sample index is megatron-core's bit for bit; it is built once, and a half-built one is never read."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_octo.data import dataset, index
from megatron_octo.data.index import IndexFiles, IndexOrder, open_index
from megatron_octo.data.indexed import CODES, HEADER, MAGIC, VERSION
from megatron_octo.errors import BadInput, OctoError
from tests.prepared import write_data

WAIT_S = 120
LENGTHS = [int(each) for each in np.random.default_rng(3).integers(1, 40, 500)]
SAYS = "import sys; from megatron_octo import console; console.configure(); from megatron_octo.data import index"

# What a process of its own runs: SCRIPT FOLDER, where FOLDER/shard is the shard and FOLDER/cache the cache.
OPENS = """
from pathlib import Path
from megatron_octo.data.index import IndexFiles, IndexOrder, open_index
import numpy as np
folder = Path(sys.argv[1])
order = IndexOrder(prefix=folder / "shard", documents=np.arange(500, dtype=np.int32), num_samples=900, seq_length=16,
                   seed=5)
"""
OPEN = 'open_index(IndexFiles(folder=folder / "cache", name="abc-PackedDataset-train"), order, "{}", builds=True)'


def write_shard(prefix: Path, lengths: Sequence[int] | np.ndarray) -> Path:
    """An index of documents of these lengths, and a .bin that is a hole."""
    sizes = np.asarray(lengths, dtype=np.int32)
    ends = np.cumsum(sizes, dtype=np.int64) * 4
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES["int32"], len(sizes), len(sizes) + 1))
        for part in (sizes, ends - 4 * sizes, np.arange(len(sizes) + 1, dtype=np.int64)):
            file.write(part.tobytes())
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(int(ends[-1]))
    return prefix


def make(kind: type, prefix: Path, documents: np.ndarray, num_samples: int | None, split: str, **config: Any) -> Any:
    """(document_index, sample_index, shuffle_index) of a data set class: as built, and as read from what it wrote."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    results = []
    with tempfile.TemporaryDirectory() as cache:
        settings = GPTDatasetConfig(
            blend=([str(prefix)], None),
            split="1,0,0",
            tokenizer=SimpleNamespace(vocab_size=100_000, eod=0, pad=-1, unique_identifiers={}),
            path_to_cache=cache,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            **config,
        )
        shard = kind.build_low_level_dataset(str(prefix), settings)
        for _ in range(2):
            made = kind(shard, str(prefix), documents, num_samples, Split[split], settings)
            results.append([np.array(x) for x in (made.document_index, made.sample_index, made.shuffle_index)])
    return results


def megatrons(*arguments: Any, **config: Any) -> Any:
    """`make` of megatron's own class."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    return make(GPTDataset, *arguments, **config)


def ours(*arguments: Any, **config: Any) -> Any:
    """`make` of our class."""
    from megatron_octo.data.dataset import packed_dataset_class

    return make(packed_dataset_class(), *arguments, **config)


def assert_equal(results: list[Any]) -> None:
    """The same arrays, types and shapes included."""
    for other in results[1:]:
        for array, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(array, expected, strict=True)


CASES = st.fixed_dictionaries(
    {
        "random_seed": st.integers(0, 2**32 - 1),
        "sequence_length": st.integers(2, 24),
        "drop_last_partial_validation_sequence": st.booleans(),
        "add_extra_token_to_sequence": st.booleans(),
    }
)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    exposed=st.tuples(st.integers(0, 39), st.integers(1, 40)),
    num_samples=st.none() | st.integers(1, 120),
    split=st.sampled_from(["train", "valid"]),
    config=CASES,
)
def test_the_index_is_megatrons(lengths, exposed, num_samples, split, config):
    documents = np.arange(len(lengths), dtype=np.int32)[exposed[0] % len(lengths) :][: exposed[1]]
    assume(sum(lengths[each] for each in documents) > 0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK", 7)  # a sample's documents then lie in several chunks
        arguments = (write_shard(Path(folder) / "shard", lengths), documents, num_samples, split)
        try:
            expected = megatrons(*arguments, **config)
        except AssertionError:  # it cannot end in an empty document
            assume(False)
        assert_equal(expected + ours(*arguments, **config))


@pytest.mark.parametrize(("epochs", "separate"), [(1.0, False), (3.0, False), (2.5, True), (2.9, False)])
def test_epochs_are_mixed_unless_the_last_is_used_in_small_part(tmp_path, epochs, separate):
    num_samples = int(epochs * (sum(LENGTHS) - 16)) // 16
    arguments = (write_shard(tmp_path / "shard", LENGTHS), np.arange(500, dtype=np.int32), num_samples, "train")
    results = [arrays for side in (megatrons, ours) for arrays in side(*arguments, random_seed=1, sequence_length=16)]
    assert_equal(results)
    last_epoch = np.sort(results[0][0][-500:])
    assert (last_epoch == np.arange(500)).all() == (separate or epochs == 1)


@pytest.mark.parametrize(("tokens", "seq_length", "off_by"), [(30_000_002, 3, -1), (33_554_599, 33, 1)])
def test_megatrons_single_precision_is_kept(tmp_path, tokens, seq_length, off_by):
    lengths = np.full(30_000, tokens // 30_000)
    lengths[-1] += tokens % 30_000
    arguments = (write_shard(tmp_path / "shard", lengths), np.arange(len(lengths), dtype=np.int32), None, "valid")
    config = {"random_seed": 1, "sequence_length": seq_length, "drop_last_partial_validation_sequence": False}
    expected = megatrons(*arguments, **config)
    assert_equal(expected + ours(*arguments, **config))
    assert len(expected[0][2]) == -(-(tokens - 1) // seq_length) + off_by


@pytest.mark.parametrize("size", [2, 3, 4, 5, 63, 64, 65, 4095, 4096, 4097, 200_000])
def test_shuffles_are_numpys_and_so_is_what_is_drawn_next(size, monkeypatch):
    for name, value in (("NUMPY_SHUFFLES_BELOW", 2), ("DRAWN_WORDS", 1 << 10), ("SWAPPED_AT_ONCE", 100)):
        monkeypatch.setattr(index, name, value)
    values, expected = np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)
    random, numpys = np.random.RandomState(size), np.random.RandomState(size)
    for _ in range(2):
        index.shuffle(values, random)
        numpys.shuffle(expected)
        np.testing.assert_array_equal(values, expected)
        assert random.tomaxint() == numpys.tomaxint()


def test_a_shard_without_tokens_is_refused(tmp_path):
    prefix = write_shard(tmp_path / "shard", [0, 0])
    order = IndexOrder(prefix=prefix, documents=np.arange(2, dtype=np.int32), num_samples=1, seq_length=4, seed=1)
    with pytest.raises(BadInput, match="no tokens"):
        open_index(IndexFiles(folder=tmp_path / "cache", name="a-b"), order, "", builds=True)


@pytest.fixture
def built(tmp_path: Path) -> tuple[IndexFiles, IndexOrder, list[np.ndarray]]:
    """The order that `OPENS` builds, where, and what it must be."""
    order = IndexOrder(
        prefix=write_shard(tmp_path / "shard", LENGTHS),
        documents=np.arange(500, dtype=np.int32),
        num_samples=900,
        seq_length=16,
        seed=5,
    )
    right = open_index(IndexFiles(folder=tmp_path / "right", name="right-one"), order, "", builds=True)
    files = IndexFiles(folder=tmp_path / "cache", name="abc-PackedDataset-train")
    return files, order, [np.array(each) for each in right]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run lines of Python after `OPENS` in a process of its own; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(*lines: str, wait: bool = True) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", "\n".join([SAYS, OPENS, *lines]), str(tmp_path)]
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            if wait:
                process.wait(WAIT_S)
            return process

        yield start


# Counts what the build does to files, and dies at step POINT of it; without POINT, prints the steps.
DIES = """
import os, signal
steps = 0
def hook(event, arguments):
    global steps
    if event in ("open", "os.rename", "os.remove") and str(folder / "cache") in str(arguments[0]):
        steps += 1
        if steps == POINT:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""
# Syncs WHOLE files, then cuts the next to BYTES, and dies.
TEARS = """
import os, signal
sync, synced = os.fsync, 0
def torn(descriptor):
    global synced
    synced += 1
    if synced <= WHOLE:
        return sync(descriptor)
    os.ftruncate(descriptor, BYTES)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = torn
"""
FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))
"""


def assert_never_half(files: IndexFiles, order: IndexOrder, right: list[np.ndarray]) -> None:
    """What a kill left is not taken for an index, unless it is one; the next build is right and clears up."""
    if files.whole():
        assert_equal([right, files.load()])
    assert_equal([right, open_index(files, order, "{}", builds=True)])
    left = {path.name for path in files.folder.iterdir()}
    assert left == {path.name for path in (*files.arrays, files.description)} | {index.LOCK}


def test_a_build_killed_anywhere_is_built_anew(run, built):
    files, order, right = built
    counted = run(DIES.replace("POINT", "None"), OPEN, "print('steps', steps, file=sys.stderr)")
    steps = int(re.search(r"steps (\d+)", counted.stderr.read()).group(1))
    assert steps >= 8, "four files are opened and renamed"
    half_built = 0
    for point in range(1, steps + 1):
        for path in files.folder.iterdir():
            path.unlink()
        assert run(DIES.replace("POINT", str(point)), OPEN).returncode == -signal.SIGKILL
        half_built += any(path.exists() for path in files.arrays) and not files.whole()
        assert_never_half(files, order, right)
    assert half_built >= 3, "some kills left some arrays in place"


@pytest.mark.parametrize("whole", range(3))
@pytest.mark.parametrize("size", [0, 100, 128, 3001])
def test_a_build_killed_within_a_write_is_built_anew(run, built, whole, size):
    files, order, right = built
    died = run(TEARS.replace("WHOLE", str(whole)).replace("BYTES", str(size)), OPEN)
    assert died.returncode == -signal.SIGKILL
    assert [path.exists() for path in files.arrays] == [each < whole for each in range(3)]
    assert [path.stat().st_size for path in files.folder.glob("*.tmp")] == [size]
    assert not files.whole()
    assert_never_half(files, order, right)


@pytest.mark.parametrize(("size", "left"), [(100, 0), (3000, 0), (4127, 0), (4128, 1), (10_000, 1)])
def test_a_full_disk_stops_the_build_and_is_not_left_full(run, built, size, left):
    files, order, right = built
    failed = run(FULL.replace("BYTES", str(size)), OPEN)
    assert failed.returncode == 1
    assert "OSError" in failed.stderr.read()
    assert sorted(files.folder.iterdir()) == [files.folder / index.LOCK, *files.arrays[:left]]
    assert_never_half(files, order, right)


@pytest.mark.parametrize("missing", range(4))
def test_an_index_that_lost_a_file_is_built_anew(built, missing):
    files, order, right = built
    open_index(files, order, "{}", builds=True)
    (*files.arrays, files.description)[missing].unlink()
    assert_never_half(files, order, right)


SLOW = """
write = index._write
def slow(path, content):
    (folder / "builds").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    write(path, content)
index._write = slow
"""


def test_a_second_process_waits_says_so_and_does_not_build(run, tmp_path, built):
    files, _, right = built
    first = run("import time", SLOW, OPEN, wait=False)
    _until((tmp_path / "builds").exists)
    second = run(OPEN, wait=False)
    said = second.stderr.readline()
    assert f"waiting for process {first.pid} on {socket.gethostname()} to build the sample index of" in said
    time.sleep(0.3)
    assert second.poll() is None
    (tmp_path / "go").touch()
    assert "built the sample index of" in first.communicate(timeout=WAIT_S)[1]
    said = second.communicate(timeout=WAIT_S)[1]
    assert re.search(r"waited \d\.\ds for the sample index", said)
    assert "built" not in said
    assert (first.returncode, second.returncode) == (0, 0)
    assert_equal([right, files.load()])


def test_whoever_waits_for_a_killed_build_builds(run, tmp_path, built):
    files, _, right = built
    first = run("import time", SLOW, OPEN, wait=False)
    _until((tmp_path / "builds").exists)
    second = run(OPEN, wait=False)
    assert "waiting for" in second.stderr.readline()
    first.kill()
    assert "built the sample index of" in second.communicate(timeout=WAIT_S)[1]
    assert_equal([right, files.load()])


def test_other_ranks_never_build_and_wait_for_files_to_appear(built, monkeypatch):
    files, order, right = built
    monkeypatch.setattr(index, "VISIBLE_WITHIN_S", 0.0)
    with pytest.raises(OctoError, match="rank 0 built the sample index"):
        open_index(files, order, "{}", builds=False)
    assert not files.folder.exists()
    monkeypatch.setattr(index, "VISIBLE_WITHIN_S", WAIT_S)
    threading.Timer(0.3, open_index, (files, order, "{}"), {"builds": True}).start()
    assert_equal([right, open_index(files, order, "{}", builds=False)])


RANKS = """
import hashlib, os, time
import numpy as np, torch
from pathlib import Path
from megatron_octo.data import dataset
from megatron_octo.data.loader import build_dataset
from megatron_octo.data.mixture import read_mixture
from megatron_octo.config.data import MixtureConfig
from tests.prepared import SEQ_LENGTH, VOCAB, stage
folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
dataset.SAYS_AFTER_S, build = 0.5, index._build
def slow(*arguments):
    time.sleep(1.0)
    build(*arguments)
index._build = slow
config = stage(folder / "data", "run").data
made = build_dataset(read_mixture(config, model_vocab_size=VOCAB), num_sequences=300, seq_length=SEQ_LENGTH, seed=1,
                     cache=folder / "cache", reads_data=True)
print(hashlib.sha256(np.stack([made[each]["tokens"].numpy() for each in range(300)]).tobytes()).hexdigest())
"""


def test_rank_0_builds_once_and_the_others_say_once_that_they_wait(tmp_path):
    write_data(tmp_path / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SAYS + RANKS, str(tmp_path)],
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=WAIT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    said = "".join(err for _, err in outputs)
    assert said.count("built the sample index of") == 4  # two sources of two shards
    assert said.count("waiting for rank 0 to build the sample index in") == 1
    assert "[rank 1 on" in outputs[1][1]


@pytest.mark.parametrize(
    ("place", "takes_s", "says"),
    [((0, 0), 0.5, 0), ((1, 1), 0.5, 1), ((2, 2), 0.5, 0), ((8, 0), 0.5, 1), ((9, 1), 0.5, 0), ((1, 1), 0.0, 0)],
)
def test_one_rank_of_each_node_says_that_it_waits_if_it_waits_long(monkeypatch, caplog, place, takes_s, says):
    monkeypatch.setenv("RANK", str(place[0]))
    monkeypatch.setenv("LOCAL_RANK", str(place[1]))
    monkeypatch.setattr(dataset, "SAYS_AFTER_S", 0.2)
    with dataset.waiting_for_rank_0(Path("CACHE")):
        time.sleep(takes_s)
    time.sleep(0.5 - takes_s)
    assert caplog.text.count("waiting for rank 0 to build the sample index in CACHE") == says


def _until(what: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)
