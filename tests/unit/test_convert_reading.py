"""Conversion without megatron: what folders and saves are read as, and what is refused before anything is written."""

from __future__ import annotations

import itertools
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_octo import checksums, lineage, rundir
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.convert import hf_folder, torch_dist
from megatron_octo.convert.from_hf import from_hf
from megatron_octo.convert.random_base import random_base
from megatron_octo.convert.safetensors_file import Named
from megatron_octo.convert.save import Save, find_save, per_layer
from megatron_octo.convert.to_hf import to_hf
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping
from megatron_octo.model.weights import check_shape
from tests.conftest import flip_bit, snapshot
from tests.unit.small_model import MODEL


def test_number_formats_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save = Save(from_hf(base, tmp_path / "import", logits=False))
    assert save.read("decoder.layers.mlp.linear_fc2.weight", 1).dtype == torch.bfloat16


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
    assert told["settings"] == str(made / "base") and f"are those of {made / 'base'}" in caplog.text
    tensors = load_file(out / "model.safetensors")
    padded = torch_dist.Reader(save).read("output_layer.weight")
    assert tensors["lm_head.weight"].shape == (32, 16) and torch.equal(tensors["lm_head.weight"], padded[:32])


@pytest.mark.parametrize(("size", "rows"), [(262, 262), (262, 263), (262, 320), (384, 1152), (151_669, 151_936)])
def test_all_rows_beyond_the_vocabulary_are_padding(tmp_path: Path, size: int, rows: int) -> None:
    small = replace(MODEL, hidden_size=4, num_layers=1, num_heads=4, num_kv_heads=1, head_dim=1, ffn_size=1)
    rundir.write_json(tmp_path / "config.json", mapping.hf_config(replace(small, vocab_size=size), dtype="float32"))
    save = Save(plain(tmp_path / "save", replace(small, vocab_size=rows)), tmp_path)
    assert save.vocab_rows == rows and len(save.read("output_layer.weight")) == size
    assert any("rows of a vocabulary" in told for told in save.warnings()) == (rows > size)


def test_an_embedding_of_another_width_is_no_padding(tmp_path: Path) -> None:
    rundir.write_json(tmp_path / "config.json", mapping.hf_config(MODEL, dtype="float32"))
    save = plain(tmp_path / "save", replace(MODEL, vocab_size=128, hidden_size=8))
    with pytest.raises(BadInput, match=r"word_embeddings.weight is \(128, 8\)"):
        Save(save, tmp_path)


def test_heads_that_predict_further_tokens_are_left_out_and_told(
    made: Path, words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save = plain(tmp_path / "run/iter_0000007", MODEL)
    index = torch_dist.read_index(save)
    norm = index.state_dict_metadata["decoder.final_layernorm.weight"]
    keys = [f"mtp.layers.0.{name}" for name in ("enorm.weight", "eh_proj.weight", "eh_proj._extra_state")]
    index.state_dict_metadata |= dict.fromkeys(keys, norm)
    (save / torch_dist.INDEX).write_bytes(pickle.dumps(index))
    out = to_hf(save, tmp_path / "out", words, config=made / "base", logits=False)
    assert f"{save} has 2 tensors (mtp.) that predict further tokens: left out" in caplog.text
    assert load_file(out / "model.safetensors").keys() == mapping.hf_shapes(MODEL).keys()


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


def test_a_changed_model_json_of_an_import_is_noticed(made: Path, words: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(made / "import", tmp_path / "import"))
    rundir.write_json(spoilt / "model.json", {**rundir.read_json(spoilt / "model.json"), "rope_theta": 10_000.0})
    calls = (
        lambda: to_hf(spoilt, tmp_path / "out", words, verify=False),
        lambda: from_hf(made / "base", spoilt, logits=False),
        lambda: check_shape(replace(MODEL, rope_theta=10_000.0), spoilt),
    )
    for call in calls:
        with pytest.raises(BadInput, match=r"model\.json was changed since it was written"):
            call()
    link = lineage.read(spoilt)
    lineage.write(spoilt, replace(link, recipe_sha256=""))  # one that was imported before this was recorded
    assert to_hf(spoilt, tmp_path / "out", words, verify=False)


def test_a_save_of_another_shape_than_its_model_json_says_is_refused(made: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(made / "import", tmp_path / "import"))
    lineage.write(spoilt, replace(lineage.read(spoilt), kind="train"))
    rundir.write_json(spoilt / "model.json", {**rundir.read_json(spoilt / "model.json"), "ffn_size": 12})
    with pytest.raises(
        BadInput, match=r"linear_fc1.weight is \(2, 48, 16\), the model of model.json has \(2, 24, 16\)"
    ):
        Save(spoilt)
