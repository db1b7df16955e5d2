"""Data sets on the Hub, against a stand-in: all of a file, or an error that says what to do."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo.config.data import CorpusFacts, HubSource, PrepareConfig
from megatron_octo.data.hub import HubFile, check_access, downloads_folder, fetch, release
from megatron_octo.data.hub_listing import plan_downloads
from megatron_octo.data.inputs import find_inputs
from megatron_octo.data.prepare import prepare
from megatron_octo.data.read import read_records
from megatron_octo.errors import BadInput, OctoError
from tests.conftest import REPOSITORY, snapshot
from tests.fake_hub import BAD, COMMIT, CONVERTED, GOOD, LARGE, Repository

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config(tmp_path) -> PrepareConfig:
    return PrepareConfig(
        name="web",
        hub=HubSource(repository="owner/public", files=("data/*.jsonl",)),
        template="text",
        tokenizer=tmp_path / "tokenizer",
        output=tmp_path / "data" / "web",
    )


@pytest.fixture
def gated(config) -> PrepareConfig:
    return replace(config, hub=HubSource(repository="owner/gated", files=("data/*.jsonl",), gated=True))


@pytest.fixture
def large(fake) -> HubFile:
    """The plan of the 1 MiB file."""
    (file,) = plan_downloads(HubSource(repository="owner/public", files=("large/*.parquet",)))
    return file


def test_a_public_set_is_read_in_the_order_of_its_names(fake, config):
    folder = downloads_folder(config)
    files = plan_downloads(config.hub)
    assert [(file.path, file.commit) for file in files] == [("data/a.jsonl", COMMIT), ("data/b.jsonl", COMMIT)]
    check_access(config, files)
    assert not folder.exists()
    texts = []
    for file in files:
        texts += [row["text"] for row in read_records(fetch(file, folder))]
        release(file, folder)
        assert not list(folder.rglob("*.jsonl"))
    assert texts == ["one", "two", "three"]
    assert not folder.exists()


def test_a_commit_is_read_where_a_branch_is_named(fake, config):
    (first, _) = plan_downloads(config.hub)
    fetch(first, downloads_folder(config))
    assert [path for _, path, _ in fake.asked if "/resolve/" in path] == [
        f"/datasets/owner/public/resolve/{COMMIT}/data/a.jsonl"
    ]


def test_a_renamed_set_is_found_under_its_old_name(fake, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD)
    fake.renamed["old/name"] = "owner/public"
    files = plan_downloads(replace(config.hub, repository="old/name"))
    check_access(config, files)
    assert fetch(files[1], downloads_folder(config)).read_bytes() == b'{"text": "three"}\n'


def test_only_the_folders_of_the_patterns_are_listed(fake, config):
    plan_downloads(replace(config.hub, files=("data/a*", "data/b*", "large/c.parquet")))
    listed = [path.partition(COMMIT)[2] for _, path, _ in fake.asked if "/tree/" in path]
    assert listed == ["/data", "/large"]


def test_a_kept_download_is_verified_and_not_asked_for_again(fake, large, tmp_path):
    path = fetch(large, tmp_path)
    assert path == tmp_path / "large" / "c.parquet"
    assert fetch(large, tmp_path) == path
    assert fake.downloads() == [""]
    path.write_bytes(LARGE[:-1] + b"?")
    assert fetch(large, tmp_path).read_bytes() == LARGE
    assert fake.downloads() == ["", ""]


def test_a_gated_set_without_a_token_names_the_page(fake, gated, tmp_path):
    files = plan_downloads(gated.hub)
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match=r"gated.*HF_TOKEN is not set") as caught:
        check_access(gated, files)
    assert "https://huggingface.co/datasets/owner/gated and accept the terms" in caught.value.fix
    assert "set HF_TOKEN" in caught.value.fix
    assert snapshot(tmp_path) == before


def test_a_gated_set_with_a_token_that_has_no_access_names_the_page(fake, gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", BAD)
    with pytest.raises(BadInput, match="the token's account has no access") as caught:
        check_access(gated, plan_downloads(gated.hub))
    assert "https://huggingface.co/datasets/owner/gated as that account" in caught.value.fix


def test_a_gated_set_is_read_with_a_token_that_the_storage_never_sees(fake, gated, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", GOOD)
    (file,) = plan_downloads(gated.hub)
    check_access(gated, [file])
    assert fetch(file, tmp_path).read_bytes() == fake.repositories["owner/gated"].files["data/a.jsonl"]
    sent = {path.split("/")[1]: "authorization" in headers for _, path, headers in fake.asked}
    assert sent == {"api": True, "datasets": True, "get": False}


def test_access_lost_on_the_way_names_the_page(fake, gated, tmp_path):
    (file,) = plan_downloads(gated.hub)
    with pytest.raises(BadInput, match="gated"):
        fetch(file, tmp_path)


@pytest.mark.parametrize("token", [None, GOOD])
def test_a_wrong_name_is_named(fake, config, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInput, match="no data set owner/pubic on the Hub, or it is private"):
        plan_downloads(replace(config.hub, repository="owner/pubic"))
    with pytest.raises(BadInput, match="'owner/public/data' is no data set's name"):
        plan_downloads(replace(config.hub, repository="owner/public/data"))


def test_a_wrong_revision_is_named(fake, config):
    with pytest.raises(BadInput, match="owner/public has no revision 'v2'"):
        plan_downloads(replace(config.hub, revision="v2"))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("data/*.parquet", "data/a.jsonl"), ("date/*.jsonl", "data/"), ("dat/x/*.jsonl", "data/"), ("a.jsonl", "data/")],
)
def test_a_pattern_that_fits_nothing_shows_what_is_near(fake, config, pattern, near):
    with pytest.raises(BadInput, match=f"has no file '{re.escape(pattern)}' at revision main") as caught:
        plan_downloads(replace(config.hub, files=("data/*.jsonl", pattern)))
    assert near in caught.value.fix


def test_a_pattern_means_what_it_means_to_glob(fake, config):
    names = ("a.jsonl", "x/a.jsonl", "x/y/a.jsonl", "x/y/b.jsonl", "xy/a.jsonl")
    fake.repositories["owner/public"] = Repository(dict.fromkeys(names, b"{}"))

    def found(*patterns: str) -> list[str]:
        return [each.path for each in plan_downloads(replace(config.hub, files=patterns))]

    assert found("*.jsonl") == ["a.jsonl"]
    assert found("*/*.jsonl") == ["x/a.jsonl", "xy/a.jsonl"]
    assert found("**/a.jsonl") == ["a.jsonl", "x/a.jsonl", "x/y/a.jsonl", "xy/a.jsonl"]
    assert found("x/**") == ["x/a.jsonl", "x/y/a.jsonl", "x/y/b.jsonl"]
    assert found("x/**/[b-z].jsonl", "?.jsonl") == ["a.jsonl", "x/y/b.jsonl"]


def test_a_file_of_no_kind_that_we_read_is_refused(fake, config):
    with pytest.raises(BadInput, match=r"README\.md is of no kind that can be read"):
        plan_downloads(replace(config.hub, files=("*",)))


CARD = [
    {
        "config_name": "main",
        "data_files": [{"split": "train", "path": "main/train-*"}, {"split": "test", "path": "t.jsonl"}],
    },
    {"config_name": "socratic", "default": True, "data_files": {"train": ["s/a.jsonl", "s/b.jsonl"]}},
    {"config_name": "plain", "data_dir": "p", "data_files": "**/*.jsonl"},
    {"config_name": "nowhere"},
]


@pytest.fixture
def named(fake):
    """The paths of what (subset, split, revision) name in a data set of these files, card and conversion."""

    def paths(subset: str, split: str, *, files=(), card=None, converted=(), revision: str = "main") -> list[str]:
        fake.repositories["owner/named"] = Repository(
            dict.fromkeys(("README.md", *files), b"{}"),
            card={"license": "mit", "configs": card} if card else {},
            converted=dict.fromkeys(converted, b"{}"),
        )
        hub = HubSource(repository="owner/named", subset=subset, split=split, revision=revision)
        return [each.path for each in plan_downloads(hub)]

    return paths


def test_a_subset_and_a_split_are_the_files_that_the_card_says(named):
    files = ("main/train-0.jsonl", "main/train-1.jsonl", "main/test-0.jsonl", "t.jsonl", "s/a.jsonl", "s/b.jsonl")
    files += ("p/a.jsonl", "p/q/b.jsonl")
    for subset, split, found in (
        ("main", "train", ["main/train-0.jsonl", "main/train-1.jsonl"]),
        ("main", "test", ["t.jsonl"]),
        ("socratic", "train", ["s/a.jsonl", "s/b.jsonl"]),
        ("", "train", ["s/a.jsonl", "s/b.jsonl"]),
        ("plain", "train", ["p/a.jsonl", "p/q/b.jsonl"]),
    ):
        assert named(subset, split, files=files, card=CARD) == found
    assert named("", "test", files=files, card=CARD[:1]) == ["t.jsonl"]
    assert named("", "test", files=files, card=CARD[0]) == ["t.jsonl"]


@pytest.mark.parametrize(
    ("asked", "card", "reason", "fix"),
    [
        (("mian", "train"), CARD, "no subset mian", "main, socratic, plain"),
        (("", "train"), [CARD[0], CARD[2]], "no default subset", "main, plain"),
        (("main", "dev"), CARD, "no split dev in subset main", "train, test"),
        (("", "train"), ["main"], "malformed at `configs`", "`files`"),
        (("", "train"), [{"data_files": [{"split": "train"}]}], "malformed at `configs`", "`files`"),
        (("main", "train"), CARD, r"no file 'main/train-\*'", "README.md"),
    ],
)
def test_a_subset_or_a_split_that_there_is_not_is_named_with_those_there_are(named, asked, card, reason, fix):
    with pytest.raises(BadInput, match=reason) as caught:
        named(*asked, card=card)
    assert fix in caught.value.fix


def test_without_a_card_a_split_is_where_uploads_put_it(named):
    files = ("data/train-0.parquet", "data/train_sft-0.parquet", "extra/train-0.parquet", "data/test-0.parquet")
    assert named("", "train", files=files) == ["data/train-0.parquet"]
    assert named("extra", "train", files=files, card=[{"config_name": "extra"}]) == ["extra/train-0.parquet"]


def test_else_a_split_is_where_the_hub_has_converted_it(fake, named, tmp_path):
    converted = ("default/train/0000.parquet", "default/train/0001.parquet", "other/partial-train/0000.parquet")
    found = ["default/train/0000.parquet", "default/train/0001.parquet"]
    assert named("", "train", files=("a.csv",), converted=converted) == found
    (file, _) = plan_downloads(HubSource(repository="owner/named", split="train"))
    assert file.commit == CONVERTED
    assert fetch(file, tmp_path).read_bytes() == b"{}"
    for subset, split, reason in (
        ("other", "train", "converted only its beginning"),
        ("third", "train", "no subset third"),
        ("default", "test", "no split test in subset default"),
    ):
        with pytest.raises(BadInput, match=reason):
            named(subset, split, converted=converted)
    for revision, reason in (("main", "nor has the Hub converted it"), (COMMIT, r"no data/train-\*$")):
        with pytest.raises(BadInput) as caught:
            named("", "train", converted=converted if revision == COMMIT else (), revision=revision)
        assert re.search(reason, caught.value.what)
        assert "`files`" in caught.value.fix


@pytest.mark.parametrize(
    "named_by", [{}, {"subset": "main"}, {"files": ("a",), "split": "b"}, {"files": ("a",), "subset": "b"}]
)
def test_a_source_names_files_or_a_split(named_by):
    with pytest.raises(BadInput, match="data set owner/public with files"):
        HubSource(repository="owner/public", **named_by)


def test_a_token_that_the_hub_does_not_know_is_told_so(fake, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    with pytest.raises(BadInput, match=r"401.*does not accept the token"):
        plan_downloads(config.hub)


def test_offline_says_how_to_go_on(fake, config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="only when online") as caught:
        plan_downloads(config.hub)
    assert (
        "hf download owner/public --repo-type dataset --revision main --include 'data/*.jsonl' --local-dir"
        in caught.value.fix
    )
    with pytest.raises(BadInput) as caught:
        plan_downloads(replace(config.hub, files=("data/**/*.jsonl",)))
    assert "--include 'data/**.jsonl' --local-dir" in caught.value.fix  # there a star stands for folders too
    with pytest.raises(BadInput) as caught:
        plan_downloads(replace(config.hub, files=(), split="train"))
    assert "--revision main --local-dir" in caught.value.fix
    assert "`input`" in caught.value.fix
    assert fake.asked == []


def test_an_unreachable_hub_says_how_to_go_on(fake, config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=r"only when online, and http://127\.0\.0\.1:9 cannot be reached") as caught:
        plan_downloads(config.hub)
    assert "`input`" in caught.value.fix


@pytest.fixture
def free(monkeypatch):
    """Sets what is free on the disk."""
    return lambda length: monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, length))


def test_a_disk_must_hold_the_largest_files_and_the_tokens(fake, config, free):
    small = fake.repositories["owner/public"].files["data/a.jsonl"]
    fake.repositories["owner/public"].files |= {"data/c.jsonl": LARGE, "data/d.jsonl": LARGE, "data/e.jsonl": small}
    config = replace(config, facts=CorpusFacts(licence="MIT", expected_tokens=300))
    needed = 2 * len(LARGE) + 300 * 4
    free(needed)
    find_inputs(config)
    free(needed - 1)
    with pytest.raises(BadInput, match=r"needs 2\.0 MiB .* 2\.0 MiB are free.*the largest 2 of 5 files.* 1,200 bytes"):
        find_inputs(config)
    with pytest.raises(BadInput, match=r"1,500 bytes for the tokens \(300 of 5 bytes, as facts\.expected_tokens says"):
        find_inputs(replace(config, template="chat", mark_answers=True))
    free(300 * 4 - 1)
    with pytest.raises(BadInput, match=r"600 bytes for the tokens"):
        find_inputs(config, token_bytes=2)


def test_what_is_there_already_needs_no_room(fake, config, free):
    config = replace(config, facts=CorpusFacts(licence="MIT", expected_tokens=300))
    for file in plan_downloads(config.hub):
        fetch(file, downloads_folder(config))
    config.output.mkdir()
    (config.output / "00000.bin").write_bytes(bytes(1000))
    free(200)
    find_inputs(config)
    (config.output / "00000.bin").write_bytes(bytes(999))
    with pytest.raises(BadInput, match="200 bytes are free"):
        find_inputs(config)


def test_without_a_count_of_tokens_their_room_is_guessed(fake, config, free):
    config = replace(config, hub=replace(config.hub, files=("large/*.parquet",)))
    free(3 * len(LARGE) - 1)
    with pytest.raises(BadInput, match=r"2\.0 MiB for the tokens \(guessed from the files' length\)"):
        find_inputs(config)
    free(3 * len(LARGE))
    find_inputs(config)


def test_a_disk_must_hold_the_tokens_of_files_of_this_machine(config, free, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 100)
    config = replace(config, hub=None, input=tmp_path / "a.jsonl")
    free(1400)
    find_inputs(config)
    free(1399)
    with pytest.raises(BadInput, match=r"needs 1,400 bytes .* 1,399 bytes are free: 1,400 bytes for the tokens"):
        find_inputs(config)
    find_inputs(replace(config, facts=CorpusFacts(licence="MIT", expected_tokens=100)))


def test_a_file_that_the_hub_does_not_serve_whole_is_refused_before(fake, config, large):
    with pytest.raises(BadInput, match=r"c\.parquet has 60\.0 GiB"):
        check_access(config, [replace(large, size_bytes=60 << 30)])


def test_a_download_that_breaks_off_goes_on_where_it_was(fake, large, tmp_path):
    fake.cut_after = [300_000, 0, 400_000]
    path = fetch(large, tmp_path)
    assert path.read_bytes() == LARGE
    assert fake.downloads() == ["", "bytes=300000-", "bytes=300000-", "bytes=700000-"]
    assert [each.name for each in path.parent.iterdir()] == ["c.parquet"]


def test_a_download_that_is_given_up_goes_on_next_time(fake, large, tmp_path):
    fake.cut_after = [300_000] + [0] * 6
    with pytest.raises(OctoError, match="stopped at") as caught:
        fetch(large, tmp_path)
    assert caught.value.exit_code == 1
    assert "goes on from there" in caught.value.fix
    assert not (tmp_path / "large" / "c.parquet").exists()
    asked = len(fake.downloads())
    assert fetch(large, tmp_path).read_bytes() == LARGE
    assert fake.downloads()[asked:] == ["bytes=300000-"]


def test_a_download_whose_process_is_killed_goes_on(fake, large, tmp_path):
    fake.stall = True
    program = (
        "import sys\nfrom pathlib import Path\nfrom megatron_octo.data.hub import HubFile, fetch\n"
        f"fetch({large!r}, Path(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "home")},
    )
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in tmp_path.rglob("*.part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    fake.stall = False
    (part,) = tmp_path.rglob("*.part")
    there = part.stat().st_size
    assert 0 < there < len(LARGE)
    assert fetch(large, tmp_path).read_bytes() == LARGE
    assert fake.downloads() == ["", f"bytes={there}-"]


def test_a_server_without_ranges_sends_all_of_it_again(fake, large, tmp_path):
    fake.cut_after, fake.no_ranges = [300_000], True
    assert fetch(large, tmp_path).read_bytes() == LARGE


def test_a_download_that_differs_from_the_listing_is_refused(fake, large, tmp_path):
    fake.flip = True
    with pytest.raises(OctoError, match=r"c\.parquet is not what the Hub lists"):
        fetch(large, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_small_file_is_verified_too(fake, config, tmp_path):
    (small, _) = plan_downloads(config.hub)
    assert small.sha256 is None
    fake.flip = True
    with pytest.raises(OctoError, match=r"a\.jsonl is not what the Hub lists"):
        fetch(small, tmp_path)


def test_a_damaged_part_costs_one_more_download(fake, large, tmp_path):
    fake.cut_after = [300_000] + [0] * 6
    with pytest.raises(OctoError):
        fetch(large, tmp_path)
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(bytes(300_000))
    asked = len(fake.downloads())
    assert fetch(large, tmp_path).read_bytes() == LARGE
    assert fake.downloads()[asked:] == ["bytes=300000-", ""]


def test_a_busy_hub_is_asked_again_and_then_given_up(fake, large, tmp_path):
    fake.status = 503
    with pytest.raises(OctoError, match="the Hub answers 503"):
        fetch(large, tmp_path)


def test_the_token_is_never_shown(fake, gated, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    caplog.set_level(logging.DEBUG, logger="huggingface_hub")
    shown = ""
    for token in (GOOD, BAD, "hf_mistyped"):
        monkeypatch.setenv("HF_TOKEN", token)
        for cut in ([], [3, *[0] * 6]):
            fake.cut_after = cut
            try:
                (file,) = plan_downloads(gated.hub)
                check_access(gated, [file])
                fetch(file, tmp_path / f"{token[3:6]}{len(cut)}")
            except OctoError:
                shown += traceback.format_exc()
    assert "no access" in shown and "does not accept" in shown and "stopped at" in shown and caplog.text
    files = "".join(snapshot(tmp_path)) + "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for token in (GOOD, BAD, "hf_mistyped"):
        assert token not in shown + caplog.text + files


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_hubs_own_environment_variables_are_honoured(fake, tmp_path, offline):
    program = (
        "from megatron_octo.config.data import HubSource\nfrom megatron_octo.data.hub_listing import plan_downloads\n"
        "print(len(plan_downloads(HubSource(repository='owner/public', files=('data/*.jsonl',)))))"
    )
    environment = {**os.environ, "HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if offline == "1":
        assert "HF_HUB_OFFLINE is set" in done.stderr
    else:
        assert done.stdout == "2\n", done.stderr


def test_hugging_face_is_loaded_only_when_it_is_used():
    program = "import sys, megatron_octo.data.inputs\nprint('huggingface_hub' in sys.modules, 'httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_release_keeps_what_is_not_its_own(fake, large, config):
    folder = downloads_folder(config)
    path = fetch(large, folder)
    (folder / "large" / "other.parquet").write_bytes(b"")
    release(large, folder)
    release(large, folder)
    assert not path.exists()
    assert (folder / "large" / "other.parquet").exists()
    assert Path(folder).is_dir()


@pytest.fixture
def ready(fake, config, tokenizer_folder) -> PrepareConfig:
    """A source of three files, one of them large, in shards that end with a file."""
    lines = [b"".join(b'{"text": "document %d of %d"}\n' % (at, n) for at in range(200)) for n in range(3)]
    files = {f"data/part{n}.jsonl": each for n, each in enumerate(lines)} | {"data/part9.jsonl": b'{"text": "last"}\n'}
    fake.repositories["owner/public"] = Repository(files)
    return replace(config, tokenizer=tokenizer_folder, shard_tokens=10)


def test_a_source_on_the_hub_becomes_the_same_data_set_as_its_files_here(fake, ready, tmp_path):
    manifest = prepare(ready, num_workers=2)
    assert not downloads_folder(ready).exists()
    assert [str(each.file.path) for each in manifest.sources] == [
        f"datasets/owner/public@{COMMIT}/data/part{n}.jsonl" for n in (0, 1, 2, 9)
    ]
    for name, content in fake.repositories["owner/public"].files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    local = replace(ready, hub=None, input=tmp_path / "data" / "*.jsonl", output=tmp_path / "local")
    assert prepare(local).shards == manifest.shards
    assert [each.sha256 for each in manifest.sources] == [each.sha256 for each in prepare(local).sources]
    assert prepare(ready) == manifest  # done: the Hub is not asked


def test_an_attempt_that_the_hub_ended_goes_on_with_the_same_commit(fake, ready):
    whole = fake.repositories["owner/public"].files

    def fetch_two(file, folder):
        if file.path.endswith("part2.jsonl"):
            raise OctoError("the Hub is ill")
        return fetch(file, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_octo.data.inputs.fetch", fetch_two)
        with pytest.raises(OctoError, match="the Hub is ill"):
            prepare(ready, num_workers=1)
    progress = json.loads((ready.output / "progress.json").read_text())
    assert len(progress["shards"]) == 2
    fake.repositories["owner/public"] = Repository({**whole, "data/part1a.jsonl": b'{"text": "new"}\n'})
    fake.asked.clear()
    manifest = prepare(ready, num_workers=1)
    assert manifest.documents == 601  # the new file is of a later commit
    assert not any("part0.jsonl" in path for _, path, _ in fake.asked)
    assert not downloads_folder(ready).exists()
