"""Conversion without megatron: folders in, folders out, and what is refused before anything is written."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_octo import checksums, lineage, rundir
from megatron_octo.budget.ledger import LedgerRecord, SourceTokens
from megatron_octo.config.base import to_dict
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert import hf_folder, model_card, output, torch_dist
from megatron_octo.convert import verify as verify_module
from megatron_octo.convert.from_hf import from_hf
from megatron_octo.convert.hf_folder import Dtype
from megatron_octo.convert.random_base import random_base
from megatron_octo.convert.safetensors_file import Named
from megatron_octo.convert.save import Save, find_save, per_layer
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.model import mapping
from tests.conftest import flip_bit, snapshot

MODEL = ModelConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=24,
    vocab_size=32,
    tied_embeddings=False,
    max_positions=64,
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder of 20 ids, begin 1, end 2."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """A folder with `base`, a random model, and `import`, made from it."""
    folder = tmp_path_factory.mktemp("made")
    random_base(RandomBaseConfig(model=MODEL, tokenizer=words, output=folder / "base"))
    from_hf(folder / "base", folder / "import", logits=False)
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """The random model, to spoil."""
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


def test_weights_return_byte_for_byte(made: Path, words: Path, tmp_path: Path) -> None:
    to_hf(made / "import", tmp_path / "out", words, dtype="fp32", verify=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (made / "base/model.safetensors").read_bytes()


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


def test_number_formats_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save = Save(from_hf(base, tmp_path / "import", logits=False))
    assert save.read("decoder.layers.mlp.linear_fc2.weight", 1).dtype == torch.bfloat16


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


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_bit_that_the_disk_turns_is_found(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """One in the numbers of the last tensor, in the last of several files."""
    for function in (torch_dist.write, hf_folder.write_weights):
        monkeypatch.setitem(function.__kwdefaults__, "max_file_bytes", 4096)
    write_files = output.write_files

    def spoil(write: Callable[[Path], None]) -> Callable[[Path], None]:
        def spoilt(path: Path) -> None:
            write(path)
            number = load_folder(made / "base")["lm_head.weight"].numpy().tobytes()[-64:]
            content = path.read_bytes()
            if number in content:
                path.write_bytes(content.replace(number, number[:-1] + bytes([number[-1] ^ 1])))

        return spoilt

    for module in (torch_dist, hf_folder):
        monkeypatch.setattr(
            module, "write_files", lambda folder, names, write, check: write_files(folder, names, spoil(write), check)
        )

    def convert(verify: bool) -> None:
        if way == "in":
            from_hf(made / "base", tmp_path / "import", verify=verify, logits=False)
        else:
            to_hf(made / "import", tmp_path / "out", words, dtype="fp32", verify=verify, logits=False)

    with pytest.raises(VerificationError, match=r"1 tensors differ from those of .*: lm_head.weight"):
        convert(verify=True)
    assert not list(tmp_path.iterdir())
    convert(verify=False)


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


@pytest.mark.parametrize("damage", ["a bit", "no file"])
def test_an_output_that_was_damaged_since_is_refused(made: Path, words: Path, tmp_path: Path, damage: str) -> None:
    calls = (
        lambda **options: from_hf(made / "base", tmp_path / "import", verify=False, **options),
        lambda **options: to_hf(made / "import", tmp_path / "out", words, verify=False, **options),
    )
    for call in calls:
        out = call()
        (weights,) = (*out.glob("*.safetensors"), *out.glob("*.distcp"))
        if damage == "a bit":
            flip_bit(weights)
        else:
            weights.unlink()
        with pytest.raises(BadInput, match="is damaged"):
            call()
        call(overwrite=True)
        call()


def test_an_import_that_was_damaged_since_is_not_exported(made: Path, words: Path, tmp_path: Path) -> None:
    save = Path(shutil.copytree(made / "import", tmp_path / "import"))
    (file,), number = save.glob("*.distcp"), load_folder(made / "base")["lm_head.weight"].numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(number, number[:-1] + bytes([number[-1] ^ 1])))
    with pytest.raises(BadInput, match=r"import .* was damaged since it was made"):
        to_hf(save, tmp_path / "out", words, logits=False)
    assert [path.name for path in tmp_path.iterdir()] == ["import"]


def test_a_comparison_that_a_finished_output_lacks_is_made(made: Path, words: Path, tmp_path: Path) -> None:
    first = from_hf(made / "base", tmp_path / "import", verify=False)
    second = to_hf(first, tmp_path / "out", words, verify=False)
    before = snapshot(made / "base")
    from_hf(made / "base", first, logits=False)
    to_hf(first, second, words, logits=False)
    for folder in (first, second):
        assert rundir.read_json(folder / "verify.json")["num_tensors"] == 2 * 9 + 3
        assert verify_module.is_verified(folder, logits=False) and not verify_module.is_verified(folder, logits=True)
    assert "`verify.json` holds the comparison" in (second / "README.md").read_text()
    assert snapshot(made / "base") == before


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


def test_weights_that_do_not_fit_their_config_are_refused(base: Path, tmp_path: Path) -> None:
    whole = load_file(base / "model.safetensors")
    gate = "model.layers.1.mlp.gate_proj.weight"
    spoilt = {
        f"{gate} is missing": {name: t for name, t in whole.items() if name != gate},
        f"{gate} is (24, 8), the model has (24, 16)": {**whole, gate: whole[gate][:, :8].contiguous()},
        "model.layers.0.self_attn.q_proj.bias is unknown": {
            **whole,
            "model.layers.0.self_attn.q_proj.bias": torch.ones(16),
        },
        "is I64": {**whole, gate: whole[gate].long()},
        "of several number formats": {**whole, gate: whole[gate].half()},
    }
    for told, tensors in spoilt.items():
        save_file(tensors, base / "model.safetensors")
        with pytest.raises(BadInput) as refused:
            from_hf(base, tmp_path / "import", logits=False)
        assert told in str(refused.value)
    assert not (tmp_path / "import").exists()


BINARY = b"\xff\xfe\x00"
HF_FILES = {
    "config.json": (b"[]", b"{", b'"text"', BINARY, b"[" * 100_000, None),
    "model.safetensors.index.json": (
        b"[]",
        b"{}",
        BINARY,
        b'{"weight_map": []}',
        b'{"weight_map": {"lm_head.weight": 5}}',
        b'{"weight_map": {"lm_head.weight": ""}}',
        b'{"weight_map": {"lm_head.weight": "."}}',
        b'{"weight_map": {"lm_head.weight": "config.json"}}',
    ),
    "lineage.json": (b"[]", b"{}", BINARY, b'{"name": "a", "kind": "base", "weights_sha256": 5}'),
}


@pytest.mark.parametrize(
    ("file", "content"), [(file, content) for file, all in HF_FILES.items() for content in all], ids=itertools.count()
)
def test_a_torn_file_of_a_hugging_face_folder_is_refused(
    base: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    (base / file).unlink(missing_ok=True)
    if content is None:
        (base / file).mkdir()
    else:
        (base / file).write_bytes(content)
    with pytest.raises(BadInput):
        from_hf(base, tmp_path / "import")
    assert not list(tmp_path.glob("*import*"))


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        BINARY,
        *(b'{"eos_token_id": %s}' % ids for ids in (b"32", b"-1", b'"x"', b"true", b"1.0", b"[2, 99999]", b"[[2]]")),
        b'{"bos_token_id": 32}',
        b'{"pad_token_id": "0"}',
    ],
)
def test_control_ids_that_the_model_has_no_rows_for_are_refused(
    made: Path, words: Path, tmp_path: Path, content: bytes
) -> None:
    tokenizer = Path(shutil.copytree(words, tmp_path / "words"))
    (tokenizer / "generation_config.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"generation_config.json"):
        to_hf(made / "import", tmp_path / "out", tokenizer, verify=False)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("content", [b"", b".", b"..", b"/", b"\xff\x00", b"notes", b"9" * 500, "\u00b2".encode()])
def test_a_file_that_names_no_iteration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(content)
    with pytest.raises(BadInput, match=r"latest_checkpointed_iteration.txt names no iteration"):
        find_save(tmp_path)


@pytest.mark.parametrize(("named", "folder"), [("7\n", "iter_0000007"), ("release", "release")])
def test_megatrons_file_names_the_last_iteration(tmp_path: Path, named: str, folder: str) -> None:
    save = plain(tmp_path / folder, MODEL)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(named)
    assert find_save(tmp_path) == save


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


def test_tensors_that_follow_from_others_are_passed_over(base: Path, tmp_path: Path) -> None:
    whole = load_file(base / "model.safetensors")
    whole["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(whole, base / "model.safetensors")
    assert rundir.is_done(from_hf(base, tmp_path / "import", logits=False))


def test_the_output_layer_of_a_tied_model_is_the_embedding_or_the_folder_is_refused(base: Path, tmp_path: Path) -> None:
    rundir.write_json(base / "config.json", {**rundir.read_json(base / "config.json"), "tie_word_embeddings": True})
    whole = load_file(base / "model.safetensors")
    embedding = whole["model.embed_tokens.weight"]
    embedding[3, 3] = torch.nan
    turned = embedding.clone()
    turned[5, 5] *= -1
    for head in (turned, embedding.bfloat16(), embedding[:16].clone()):
        save_file({**whole, "lm_head.weight": head}, base / "model.safetensors")
        with pytest.raises(BadInput, match=r"lm_head.weight differs from model.embed_tokens.weight") as refused:
            from_hf(base, tmp_path / "import")
        assert "tie_word_embeddings to false" in refused.value.fix
    save_file({**whole, "lm_head.weight": embedding.clone()}, base / "model.safetensors")
    assert rundir.is_done(from_hf(base, tmp_path / "import", logits=False))


def test_a_folder_without_safetensors_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no \*\.safetensors"):
        from_hf(base, tmp_path / "import", logits=False)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(words: Path, tmp_path: Path) -> None:
    small = RandomBaseConfig(model=replace(MODEL, vocab_size=16), tokenizer=words, output=tmp_path / "base")
    with pytest.raises(BadInput, match="has 20 ids, the model 16 rows"):
        random_base(small)
    with pytest.raises(BadInput, match="no tokenizer"):
        random_base(replace(small, tokenizer=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["in", "out"])
def test_too_small_a_disk_is_told_before_anything_is_written(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    needed, disk = 4 * MODEL.num_parameters, namedtuple("Usage", "free")
    before = snapshot(tmp_path)

    def convert() -> None:
        if way == "in":
            from_hf(made / "base", tmp_path / "import", logits=False)
        else:
            to_hf(made / "import", tmp_path / "out", words, dtype="fp32", verify=False)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(needed - 1))
    with pytest.raises(BadInput, match="are free"):
        convert()
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


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


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


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_weight_file_that_is_missing_or_cut_off_is_refused(base: Path, tmp_path: Path, damage: str) -> None:
    weights = hf_folder.Weights(base)
    tensors = [[Named(name=n, shape=s, make=lambda n=n: weights.read(n))] for n, s in weights.shapes.items()]
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(base / "config.json", sharded)
    hf_folder.write_weights(sharded, tensors, "fp32", max_file_bytes=4096)
    victim = sorted(sharded.glob("*.safetensors"))[1]
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(BadInput, match=f"{victim.name} cannot be read"):
        from_hf(sharded, tmp_path / "import", logits=False)
    assert not list(tmp_path.glob("*import*"))


@pytest.mark.parametrize(("damage", "told"), [("missing", "has no file"), ("truncated", "holds no numbers for")])
def test_a_save_with_a_file_missing_or_cut_off_is_refused(
    made: Path, words: Path, tmp_path: Path, damage: str, told: str
) -> None:
    save = Path(shutil.copytree(made / "import", tmp_path / "import"))
    (victim,) = save.glob("*.distcp")
    whole = victim.read_bytes()
    victim.unlink()
    if damage == "truncated":
        victim.write_bytes(whole[: len(whole) // 2])
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match=told):
        to_hf(save, tmp_path / "out", words, verify=False)
    assert snapshot(tmp_path) == before


def test_a_tokenizer_that_needs_code_of_its_own_is_refused_and_the_code_not_run(
    made: Path, words: Path, tmp_path: Path
) -> None:
    tokenizer = Path(shutil.copytree(words, tmp_path / "words"))
    settings = rundir.read_json(tokenizer / "tokenizer_config.json")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    rundir.write_json(tokenizer / "tokenizer_config.json", {**settings, **own})
    (tokenizer / "own.py").write_text(
        f"from pathlib import Path\n"
        f"from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        f"class Own(PreTrainedTokenizerFast): pass\n"
    )
    with pytest.raises(BadInput, match="cannot be loaded"):
        to_hf(made / "import", tmp_path / "out", tokenizer, verify=False)
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("*out*"))


def test_a_torn_tokenizer_is_refused_as_such(made: Path, words: Path, tmp_path: Path) -> None:
    tokenizer = Path(shutil.copytree(words, tmp_path / "words"))
    (tokenizer / "tokenizer.json").write_text((words / "tokenizer.json").read_text()[:-9])
    with pytest.raises(BadInput, match="cannot be loaded") as refused:
        to_hf(made / "import", tmp_path / "out", tokenizer, verify=False)
    assert refused.value.fix.startswith("give all files of a tokenizer, whole")


def test_a_logit_that_is_no_number_fails_whichever_comes_after_it(
    made: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.rand(16, 64, 32)
    wrong = logits.clone()
    wrong[3, 5, 7] = float("nan")
    monkeypatch.setattr(verify_module, "_hf_logits", lambda *arguments: logits)
    monkeypatch.setattr(verify_module, "_megatron_logits", lambda *arguments, streamed: wrong)
    with pytest.raises(VerificationError, match="logits differ by up to nan"):
        to_hf(made / "import", tmp_path / "out", words)


def test_a_run_folder_stands_for_its_last_whole_save(made: Path, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        shutil.copytree(made / "import", rundir.step_folder(tmp_path, step))
    (rundir.step_folder(tmp_path, 10) / "DONE").unlink()
    assert find_save(tmp_path) == rundir.step_folder(tmp_path, 2)  # imports, which have no checksums
    assert find_save(rundir.step_folder(tmp_path, 1)) == rundir.step_folder(tmp_path, 1)
    for torn in (rundir.step_folder(tmp_path, 10), tmp_path / "checkpoints", tmp_path / "absent"):
        with pytest.raises(BadInput):
            find_save(torn)


def test_a_save_with_a_changed_byte_in_any_file_is_passed_over_with_a_warning_and_refused_if_named(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = (Path(shutil.copytree(made / "import", rundir.step_folder(tmp_path, step))) for step in (1, 2))
    for save in (old, new):
        (save / rundir.DONE).unlink()
        checksums.seal(save, {})
    assert find_save(tmp_path) == find_save(new) == new and not caplog.text
    for path in sorted(new.iterdir()):
        whole = path.read_bytes()
        for damage in (flip_bit, Path.unlink):
            damage(path)
            caplog.clear()
            assert find_save(tmp_path) == old, (damage, path)
            assert f"{new} is damaged ({path.name}" in caplog.text or path.name in (rundir.DONE, checksums.FILE)
            with pytest.raises(BadInput, match=rf"{new} is damaged"):
                find_save(new)
            path.write_bytes(whole)
    flip_bit(new / "model.json")
    flip_bit(old / "lineage.json")
    with pytest.raises(BadInput, match="no whole save"):
        find_save(tmp_path)


def plain(folder: Path, model: ModelConfig, *, stacked: bool = True) -> Path:
    """A checkpoint as Megatron-LM leaves it: no model.json; each layer may have keys of its own."""

    def piece(weight: mapping.Weight) -> torch_dist.Piece:
        inside = stacked and weight.layer is not None
        whole = mapping.stacked_shape(weight, model) if inside else weight.shape
        shape = (1, *weight.shape) if inside else weight.shape
        generator = torch.Generator().manual_seed(1)
        return torch_dist.Piece(
            key=weight.key if stacked else per_layer(weight.key, weight.layer),
            global_shape=whole,
            offset=(weight.layer or 0 if inside else 0, *[0] * (len(whole) - 1)),
            shape=shape,
            dtype=torch.float32,
            make=lambda: torch.randn(shape, generator=generator),
        )

    folder.mkdir(parents=True)
    torch_dist.write(folder, list(map(piece, mapping.weights(model))))
    return folder


def test_padding_of_a_plain_checkpoints_vocabulary_is_left_out(
    made: Path, words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    save = plain(tmp_path / "run/iter_0000007", replace(MODEL, vocab_size=128))
    out = to_hf(save, tmp_path / "out", words, dtype="fp32", config=made / "base", logits=False)
    told = rundir.read_json(out / "verify.json")
    assert (told["vocab_size"], told["vocab_rows"]) == (32, 128)
    assert f"{save} has 128 rows of a vocabulary of 32" in caplog.text
    tensors = load_file(out / "model.safetensors")
    padded = torch_dist.Reader(save).read("output_layer.weight")
    assert tensors["lm_head.weight"].shape == (32, 16) and torch.equal(tensors["lm_head.weight"], padded[:32])


@pytest.mark.parametrize(
    ("heads", "size", "rows", "fits"),
    [
        (4, 262, 384, True),
        (4, 262, 512, True),
        (4, 262, 320, False),
        (4, 262, 640, False),
        (9, 262, 384, True),
        (9, 384, 1152, True),
        (4, 384, 1152, False),
        (4, 384, 256, False),
        (32, 128_000, 128_256, False),
        (32, 151_669, 151_936, False),
        (32, 151_669, 152_064, True),
    ],
)
def test_as_many_rows_are_padding_as_a_number_of_tensor_parallel_ranks_makes(
    tmp_path: Path, heads: int, size: int, rows: int, fits: bool
) -> None:
    small = replace(MODEL, hidden_size=heads, num_layers=1, num_heads=heads, num_kv_heads=1, head_dim=1, ffn_size=1)
    rundir.write_json(tmp_path / "config.json", mapping.hf_config(replace(small, vocab_size=size), dtype="float32"))
    save = plain(tmp_path / "save", replace(small, vocab_size=rows))
    if fits:
        assert Save(save, tmp_path).vocab_rows == rows
    else:
        with pytest.raises(BadInput, match=r"word_embeddings.weight is"):
            Save(save, tmp_path)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"tied_embeddings": False}, "output_layer.weight"),
        ({"qkv_bias": True}, "linear_qkv.bias"),
        ({"qk_norm": True}, "k_layernorm.weight"),
        ({"num_layers": 3}, "decoder.layers"),
    ],
)
def test_a_plain_checkpoint_with_weights_that_the_config_has_not_is_refused(
    words: Path, tmp_path: Path, more: dict[str, Any], told: str, stacked: bool
) -> None:
    model = replace(MODEL, tied_embeddings=True)
    random_base(RandomBaseConfig(model=model, tokenizer=words, output=tmp_path / "base"))
    assert Save(plain(tmp_path / "same", model, stacked=stacked), tmp_path / "base")
    with pytest.raises(BadInput, match=rf"{told}.*\n  fix: give --config of this model"):
        Save(plain(tmp_path / "more", replace(model, **more), stacked=stacked), tmp_path / "base")


def test_an_optimizers_tensors_and_layers_own_records_are_passed_over(made: Path, tmp_path: Path) -> None:
    save = Path(shutil.copytree(made / "import", tmp_path / "import"))
    index = pickle.loads((save / ".metadata").read_bytes())
    norm = index.state_dict_metadata["decoder.final_layernorm.weight"]
    for key in ("optimizer.state.exp_avg.output_layer.weight", "decoder.layers.mlp.linear_fc1._extra_state"):
        index.state_dict_metadata[key] = norm
    (save / ".metadata").write_bytes(pickle.dumps(index))
    assert Save(save).model == MODEL


def test_a_plain_checkpoint_needs_settings_that_fit(made: Path, tmp_path: Path) -> None:
    small = plain(tmp_path / "run/iter_0000007", replace(MODEL, vocab_size=16))
    with pytest.raises(BadInput, match=r"word_embeddings.weight is \(16, 16\), the model of .*base has \(32, 16\)"):
        Save(small, made / "base")
    with pytest.raises(BadInput, match="settings are a pickle") as caught:
        Save(small)
    assert "--config FOLDER" in caught.value.fix
    with pytest.raises(BadInput, match="says itself which model"):
        Save(made / "import", made / "base")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(BadInput, match=r"no folder .*iter_0000008"):
        find_save(tmp_path / "run")


def test_a_save_of_another_shape_than_its_model_json_says_is_refused(made: Path, tmp_path: Path) -> None:
    spoilt = shutil.copytree(made / "import", tmp_path / "import")
    rundir.write_json(spoilt / "model.json", {**rundir.read_json(spoilt / "model.json"), "ffn_size": 12})
    with pytest.raises(
        BadInput, match=r"linear_fc1.weight is \(2, 48, 16\), the model of model.json has \(2, 24, 16\)"
    ):
        Save(spoilt)
