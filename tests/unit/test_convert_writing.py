"""Conversion without megatron: what is written, what stays of what was there, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_octo import lineage, rundir
from megatron_octo.budget.ledger import LedgerRecord, SourceTokens
from megatron_octo.cli import convert as cli
from megatron_octo.config.base import to_dict
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert import hf_folder, model_card, output, torch_dist
from megatron_octo.convert.from_hf import from_hf
from megatron_octo.convert.hf_folder import Dtype
from megatron_octo.convert.random_base import random_base
from megatron_octo.convert.safetensors_file import Named
from megatron_octo.convert.save import Save
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping
from tests.conftest import snapshot
from tests.unit.small_model import MODEL, load_folder


def test_an_export_is_a_whole_hugging_face_folder(made: Path, words: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    out = to_hf(made / "import", tmp_path / "out", words, verify=False)
    assert rundir.is_done(out)
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    assert GenerationConfig.from_pretrained(out).eos_token_id == AutoTokenizer.from_pretrained(out).eos_token_id == 2
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    chain = lineage.read(out).chain()
    assert [each.kind for each in chain] == ["base", "import", "export"]
    assert chain[-1].weights_sha256 == rundir.sha256_folder(out, "*.safetensors")
    assert "Llama" not in (out / "README.md").read_text()


def test_the_eos_ids_beside_the_tokenizer_win(made: Path, words: Path, tmp_path: Path) -> None:
    tokenizer = shutil.copytree(words, tmp_path / "words")
    rundir.write_json(tokenizer / "generation_config.json", {"eos_token_id": [2, 5], "temperature": 0.6})
    out = to_hf(made / "import", tmp_path / "out", tokenizer, verify=False)
    stated = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    assert rundir.read_json(out / "generation_config.json") == stated
    assert rundir.read_json(out / "config.json")["eos_token_id"] == [2, 5]


def test_a_card_of_a_llama_states_its_licence(made: Path, words: Path, tmp_path: Path) -> None:
    renamed = shutil.copytree(made / "import", tmp_path / "import")
    parent = lineage.Lineage(name="Llama-3.2-1B", kind="base", weights_sha256="")
    lineage.write(renamed, replace(lineage.read(renamed), parent=parent))
    out = to_hf(renamed, tmp_path / "out", words, verify=False)
    card = (out / "README.md").read_text()
    assert card.startswith("# Llama") and "Built with Llama" in card and "Llama 3.2 Community License" in card
    assert "llama3_2/license" in (out / "LICENSE").read_text()
    assert "Llama 3.2 is licensed under the Llama 3.2 Community License" in (out / "NOTICE").read_text()


def test_a_notice_of_the_base_stays_in_front_of_ours(made: Path, words: Path, tmp_path: Path) -> None:
    renamed = Path(shutil.copytree(made / "import", tmp_path / "import"))
    parent = lineage.Lineage(name="Llama-3.2-1B-tuned", kind="base", weights_sha256="")
    lineage.write(renamed, replace(lineage.read(renamed), parent=parent))
    (renamed / "NOTICE").write_text("tuned by someone\n")
    out = to_hf(renamed, tmp_path / "out", words, verify=False)
    notice = (out / "NOTICE").read_text()
    assert notice.startswith("tuned by someone\n\nLlama 3.2 is licensed under")
    assert to_hf(renamed, tmp_path / "out", words, logits=False) == out  # the card is written again
    assert (out / "NOTICE").read_text() == notice


def test_a_licence_beside_the_tokenizer_is_copied(made: Path, words: Path, tmp_path: Path) -> None:
    tokenizer = Path(shutil.copytree(words, tmp_path / "words"))
    (tokenizer / "LICENSE.txt").write_text("terms")
    out = to_hf(made / "import", tmp_path / "out", tokenizer, verify=False)
    assert (out / "LICENSE.txt").read_text() == "terms"
    assert "that of the base, random (see LICENSE.txt)" in (out / "README.md").read_text()
    assert not (out / "NOTICE").exists()


def test_the_licence_of_a_base_goes_with_its_import_into_an_export(base: Path, words: Path, tmp_path: Path) -> None:
    (base / "LICENSES").mkdir()
    for name in ("LICENSE.txt", "USE_POLICY.md"):
        (base / name).write_text(f"of the base: {name}")
    out = to_hf(from_hf(base, tmp_path / "import"), tmp_path / "out", words, verify=False)
    for name in ("LICENSE.txt", "USE_POLICY.md"):
        assert (out / name).read_text() == f"of the base: {name}"


@pytest.mark.parametrize(
    ("name", "vocab_size", "factor", "version"),
    [
        ("Llama-3.2-3B", 32, None, "3.2"),
        ("Meta-Llama-3.1-8B", 32, None, "3.1"),
        ("Meta-Llama-3-8B", 128_256, None, "3"),
        ("Llama-2-7b-hf", 32_000, None, "2"),
        ("llama32-1b", 128_256, 32.0, "3.2"),
        ("llama32-1b", 32, None, "3.2"),
        ("llama32-3b", 128_256, 32.0, "3.2"),
        ("llama31-8b", 128_256, 8.0, "3.1"),
        ("Llama-3_1-8B", 128_256, 8.0, "3.1"),
        ("Llama-3_1-8B", 32, None, "3.1"),
        ("Llama-3-8B-longer", 128_256, 8.0, "3.1"),
        ("Llama-3.3-70B-Instruct", 128_256, 8.0, "3.3"),
        ("DeepSeek-R1-Distill-Llama-8B", 128_256, 8.0, "3.1"),
        ("my-llama-8b-ft", 128_256, 8.0, "3.1"),
        ("llama-1b-proxy", 32, 32.0, "3.2"),
        ("llama-1b-proxy", 32, None, None),
        ("TinyLlama_v1.1", 32_000, None, None),
        ("open_llama_3b", 32_000, None, None),
        ("llama-30b", 32_000, None, None),
        ("base", 128_256, 8.0, "3.1"),
        ("base", 128_264, 8.0, "3.1"),
        ("base", 128_256, 32.0, "3.2"),
        ("base", 128_256, None, "3"),
        ("base", 131_072, None, None),
        ("base", 32, 32.0, None),
    ],
)
def test_a_llama_is_known_by_its_rotary_scaling_its_vocabulary_or_its_name(
    name: str, vocab_size: int, factor: float | None, version: str | None
) -> None:
    link = lineage.Lineage(name=name, kind="base", weights_sha256="")
    model = replace(MODEL, vocab_size=vocab_size, rope_factor=factor)
    assert model_card.llama_version(link, model) == version


def test_the_card_tells_what_was_trained_on_what(made: Path, words: Path, tmp_path: Path) -> None:
    save = Path(shutil.copytree(made / "import", tmp_path / "save"))
    stable = lineage.Lineage(name="s", kind="train", weights_sha256="1", step=9, tokens=900, parent=lineage.read(save))
    branch = lineage.Lineage(name="b", kind="train", weights_sha256="2", step=5, tokens=1500, parent=stable)
    lineage.write(save, branch)
    web = SourceTokens(name="web", available=1000, planned=2000, consumed=1234, planned_epochs=2.0, epochs=1.234)
    record = LedgerRecord(planned_tokens=2000, consumed_tokens=1234, sources=(web,), phases=(), streams=())
    rundir.write_json(save / "ledger.json", to_dict(record))
    card = (to_hf(save, tmp_path / "out", words, verify=False) / "README.md").read_text()
    for fact in ("base: random", "stable run: s", "branch: b", "| train | b | 5 | 1,500 |", "| web | 1,234 | 1.23 |"):
        assert fact in card


def test_an_export_speaks_in_plain_turns_unless_it_keeps_the_tokenizers_template(
    made: Path, words: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = Path(shutil.copytree(words, tmp_path / "words"))
    settings = rundir.read_json(tokenizer / "tokenizer_config.json")
    rundir.write_json(tokenizer / "tokenizer_config.json", {**settings, "chat_template": "its own"})
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    said = {}
    for template in ("plain", "own"):
        out = to_hf(made / "import", tmp_path / template, tokenizer, chat_template=template, verify=False)
        speaker = AutoTokenizer.from_pretrained(out)
        said[template] = speaker.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert said == {"plain": "<s>User:a\nAssistant:b\nUser:c\nAssistant:", "own": "its own"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_weight_file_has_the_bytes_of_the_librarys_own_writer(base: Path, tmp_path: Path, dtype: Dtype) -> None:
    tensors = load_file(base / "model.safetensors")
    out = [Named(name=name, shape=tuple(t.shape), make=lambda t=t: t) for name, t in reversed(tensors.items())]
    hf_folder.write_weights(tmp_path, [out], dtype)
    rounded = {name: t.to(getattr(torch, hf_folder.TORCH_NAMES[dtype])) for name, t in tensors.items()}
    save_file(rounded, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_large_models_are_written_and_read_in_numbered_files(base: Path, tmp_path: Path) -> None:
    weights = hf_folder.Weights(base)
    tensors = [[Named(name=n, shape=s, make=lambda n=n: weights.read(n))] for n, s in weights.shapes.items()]
    out = tmp_path / "sharded"
    out.mkdir()
    hf_folder.write_weights(out, tensors, "fp32", max_file_bytes=4096)
    shutil.copy(base / "config.json", out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * MODEL.num_parameters
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert all((out / file).stat().st_size < 8192 for file in files)
    assert from_hf(out, tmp_path / "import", logits=False)
    again, once = Save(tmp_path / "import"), Save(from_hf(base, tmp_path / "once", logits=False))
    for weight in mapping.weights(MODEL):
        assert torch.equal(again.read(weight.key, weight.layer), once.read(weight.key, weight.layer))


def test_an_import_in_several_files_is_one_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_dist.write.__kwdefaults__, "max_file_bytes", 4096)
    out = from_hf(base, tmp_path / "import", logits=False)
    assert len(list(out.glob("*.distcp"))) > 2
    link = lineage.read(out)
    assert link.weights_sha256 == rundir.sha256_folder(out, "*.distcp")
    assert link.parent == lineage.read(base)
    save, weights = Save(out), hf_folder.Weights(base)
    for weight in mapping.weights(MODEL):
        parts = weight.split(save.read(weight.key, weight.layer))
        assert all(torch.equal(part, weights.read(name)) for part, (name, _) in zip(parts, weight.parts, strict=True))


def test_tensors_that_megatron_joins_are_exported_into_one_file(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hf_folder.write_weights.__kwdefaults__, "max_file_bytes", 4096)
    out = to_hf(made / "import", tmp_path / "out", words, dtype="fp32", logits=False)
    file = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(file.values())) > 2
    assert all(len({file[name] for name, _ in weight.parts}) == 1 for weight in mapping.weights(MODEL))
    assert lineage.read(out).weights_sha256 == rundir.sha256_folder(out, "*.safetensors")


def test_a_file_has_its_name_once_it_is_checked_and_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").write_text("whole already")
    done: list[tuple[str, bool]] = []

    def sync(descriptor: int) -> None:
        (path,) = (each for each in (tmp_path / output.UNFINISHED).iterdir() if each.samefile(f"/dev/fd/{descriptor}"))
        done.append((f"sync {path.name}", (tmp_path / path.name).exists()))

    monkeypatch.setattr(output.os, "fsync", sync)

    def check(path: Path) -> None:
        done.append((f"check {path.name} {path.read_text()}", (tmp_path / path.name).exists()))

    names = ["first", "old", "last"]
    digest = output.write_files(tmp_path, names, lambda path: path.write_text(path.name), check)
    assert done == [
        ("check first first", False),
        ("sync first", False),
        ("check old whole already", True),
        ("check last last", False),
        ("sync last", False),
    ]
    assert digest == rundir.sha256_folder(tmp_path, "*")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_files_are_filled_in_order_and_one_alone_may_be_larger() -> None:
    assert output.into_files([3, 3, 9, 1, 6, 2], int, 7) == [[3, 3], [9], [1, 6], [2]]


def test_random_weights_follow_from_the_seed(made: Path, words: Path, tmp_path: Path) -> None:
    config = RandomBaseConfig(model=MODEL, tokenizer=words, output=tmp_path / "same")
    random_base(config)
    random_base(replace(config, output=tmp_path / "other", seed=1))
    same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("same", "other"))
    assert same == (made / "base/model.safetensors").read_bytes() != other


def test_random_weights_have_the_spread_asked_for(tmp_path: Path, words: Path) -> None:
    wide = replace(MODEL, hidden_size=128, ffn_size=256, num_layers=8, init_std=0.05)
    random_base(RandomBaseConfig(model=wide, tokenizer=words, output=tmp_path / "base"))
    tensors = load_file(tmp_path / "base/model.safetensors")
    assert tensors["model.layers.3.mlp.up_proj.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    assert tensors["model.layers.3.mlp.down_proj.weight"].std().item() == pytest.approx(0.05 / 4, rel=0.02)
    assert bool((tensors["model.norm.weight"] == 1).all())


def test_a_second_call_changes_nothing(made: Path, words: Path, tmp_path: Path) -> None:
    to_hf(made / "import", tmp_path / "out", words, verify=False)
    before = snapshot(tmp_path), (tmp_path / "out/DONE").stat().st_mtime_ns
    to_hf(made / "import", tmp_path / "out", words, verify=False)
    assert (snapshot(tmp_path), (tmp_path / "out/DONE").stat().st_mtime_ns) == before
    before_made = snapshot(made)
    from_hf(made / "base", made / "import", logits=False)
    random_base(RandomBaseConfig(model=MODEL, tokenizer=words, output=made / "base"))
    assert snapshot(made) == before_made


def test_an_output_made_from_something_else_is_kept_unless_overwritten(made: Path, words: Path, tmp_path: Path) -> None:
    other = RandomBaseConfig(model=MODEL, tokenizer=words, output=tmp_path / "base", seed=1)
    random_base(other)
    from_hf(tmp_path / "base", tmp_path / "import", logits=False)
    to_hf(tmp_path / "import", tmp_path / "out", words, verify=False)
    before = snapshot(tmp_path)
    refused = [
        lambda: random_base(replace(other, seed=2)),
        lambda: from_hf(made / "base", tmp_path / "import", logits=False),
        lambda: to_hf(made / "import", tmp_path / "out", words, verify=False),
        lambda: to_hf(tmp_path / "import", tmp_path / "out", words, verify=False, dtype="fp32"),
    ]
    for call in refused:
        with pytest.raises(BadInput, match=r"other|not float32"):
            call()
    assert snapshot(tmp_path) == before
    from_hf(made / "base", tmp_path / "import", overwrite=True, logits=False)
    assert lineage.read(tmp_path / "import").parent == lineage.read(made / "base")


def test_an_export_with_another_template_or_tokenizer_is_refused(made: Path, words: Path, tmp_path: Path) -> None:
    out = to_hf(made / "import", tmp_path / "out", words, verify=False)
    with pytest.raises(BadInput, match=r"another chat_template.jinja than asked for"):
        to_hf(made / "import", out, words, chat_template="own", verify=False)
    other = Path(shutil.copytree(words, tmp_path / "words"))
    (other / "tokenizer.json").write_text((words / "tokenizer.json").read_text().replace('"p"', '"q"'))
    with pytest.raises(BadInput, match=r"another tokenizer.json than asked for"):
        to_hf(made / "import", out, other, verify=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_things_in_it_is_never_replaced(
    made: Path, words: Path, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    for call in (
        lambda: from_hf(made / "base", tmp_path / "mine", overwrite=overwrite, logits=False),
        lambda: to_hf(made / "import", tmp_path / "mine", words, overwrite=overwrite),
        lambda: to_hf(made / "import", made / "import", words, overwrite=overwrite),
        lambda: from_hf(made / "base", made / "base", overwrite=overwrite, logits=False),
    ):
        with pytest.raises(BadInput, match="holds something else"):
            call()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("way", ["random", "in", "out"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_an_empty_or_absent_folder_stays_and_the_result_lies_where_it_leads(
    made: Path, words: Path, tmp_path: Path, way: str, there: bool
) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk/real").mkdir()
    (tmp_path / "link").symlink_to("disk/real")
    if way == "random":
        random_base(RandomBaseConfig(model=MODEL, tokenizer=words, output=tmp_path / "link"))
    elif way == "in":
        from_hf(made / "base", tmp_path / "link")
    else:
        to_hf(made / "import", tmp_path / "link", words, verify=False)
    assert (tmp_path / "link").is_symlink() and rundir.is_done(tmp_path / "disk/real")
    assert len(list(tmp_path.iterdir())) == 2 and len(list((tmp_path / "disk").iterdir())) == 1


def test_an_output_may_be_the_empty_folder_one_stands_in_and_not_below_a_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"file is a file"):
        from_hf(made / "base", tmp_path / "file/a/b")
    monkeypatch.chdir(tmp_path / "empty")
    from_hf(made / "base", Path())
    assert rundir.is_done(tmp_path / "empty") and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("way", ["in", "out"])
def test_too_small_a_disk_is_told_before_anything_is_written(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    needed, disk = 4 * MODEL.num_parameters + output.BESIDE_BYTES, namedtuple("Usage", "free")
    before = snapshot(tmp_path)

    def convert() -> None:
        if way == "in":
            from_hf(made / "base", tmp_path / "import", logits=False)
        else:
            to_hf(made / "import", tmp_path / "out", words, dtype="fp32", verify=False)

    words_of = {
        "in": ["from-hf", made / "base", tmp_path / "import"],
        "out": ["to-hf", made / "import", tmp_path / "out"],
    }
    options = ["--dry-run"] if way == "in" else ["--dry-run", "--dtype", "fp32", "--tokenizer", words]
    dry = cli.parse(list(map(str, words_of[way] + options)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(needed - 1))
    with pytest.raises(BadInput, match="are free"):
        convert()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(needed // 2))
    with pytest.raises(BadInput, match="are free"):
        dry.run(dry)
    assert snapshot(tmp_path) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(needed))
    convert()


def test_files_that_a_killed_export_finished_are_kept(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hf_folder.write_weights.__kwdefaults__, "max_file_bytes", 4096)
    read, reads = Save.read, 0

    def kill(self: Save, key: str, layer: int | None = None) -> torch.Tensor:
        nonlocal reads
        reads += 1
        if reads == 9:
            raise KeyboardInterrupt
        return read(self, key, layer)

    def export(dtype: Dtype = "fp32") -> Path:
        return to_hf(made / "import", tmp_path / "out", words, dtype=dtype, verify=False)

    monkeypatch.setattr(Save, "read", kill)
    with pytest.raises(KeyboardInterrupt):
        export()
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_ino for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert kept
    monkeypatch.setattr(Save, "read", read)
    out = export()
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert not (tmp_path / ".out.partial").exists()
    assert load_folder(out).keys() == load_folder(made / "base").keys()
    for name, tensor in load_folder(made / "base").items():
        assert torch.equal(load_folder(out)[name], tensor)


def test_what_a_killed_export_of_another_format_left_is_not_used(made: Path, words: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    rundir.write_json(partial / "plan.json", {"dtype": "fp16"})
    (partial / "model.safetensors").write_bytes(b"of another format")
    out = to_hf(made / "import", tmp_path / "out", words, dtype="fp32", verify=False)
    assert (out / "model.safetensors").read_bytes() == (made / "base/model.safetensors").read_bytes()
    assert not (out / "plan.json").exists()


def test_what_a_killed_import_of_other_weights_left_is_not_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lineage, "write", kill)
        with pytest.raises(KeyboardInterrupt):
            from_hf(base, tmp_path / "import", logits=False)
    assert (tmp_path / ".import.partial/__0_0.distcp").exists()
    others = {name: tensor + 1 for name, tensor in load_folder(base).items()}
    save_file(others, base / "model.safetensors", metadata={"format": "pt"})
    save = Save(from_hf(base, tmp_path / "import", verify=False))
    assert torch.equal(save.read("output_layer.weight"), others["lm_head.weight"])
