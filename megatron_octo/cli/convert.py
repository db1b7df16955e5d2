"""`octo convert from-hf | to-hf | verify | random-base`: Hugging Face <-> Megatron. Runs on the CPU, in one process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import console, lineage, rundir
from megatron_octo.cli.options import parser
from megatron_octo.errors import BadInput

if TYPE_CHECKING:
    from megatron_octo.config.model import ModelConfig
    from megatron_octo.config.pipeline import RandomBaseConfig
    from megatron_octo.config.train import ChatTemplate


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    own = parse(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: a conversion wants no GPU, and takes none from others
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's memory in pages of 2 MB: the kernel gives them faster
    own.run(own)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, refused where they make no sense; what they name need not be there yet."""
    own: argparse.Namespace = _parser().parse_args(argv)
    return own


def _parser() -> argparse.ArgumentParser:
    options = parser("convert", "Hugging Face <-> Megatron, on the CPU, checked.")
    commands = options.add_subparsers(dest="command", required=True, metavar="from-hf | to-hf | verify | random-base")

    importing = commands.add_parser(
        "from-hf", help="a Hugging Face folder -> a base that training starts from, verified"
    )
    importing.add_argument(
        "hf", metavar="HF", help="folder with config.json and safetensors, or a model's name on the Hub: owner/name"
    )
    importing.add_argument("output", metavar="OUT", type=Path, help="folder to write")
    importing.add_argument("--revision", help="of a model on the Hub: commit, tag or branch (main)")
    importing.set_defaults(run=_from_hf)

    exporting = commands.add_parser("to-hf", help="a save -> a Hugging Face folder, verified")
    exporting.add_argument(
        "save",
        metavar="SAVE",
        type=Path,
        help="a save's folder, a run folder (its newest good save), an imported base, or a plain Megatron checkpoint",
    )
    exporting.add_argument(
        "output",
        metavar="OUT",
        type=Path,
        nargs="?",
        help="folder to write; of a save in a run: its hf/step_XXXXXXXX, or hf/Llama-...-step_XXXXXXXX",
    )
    exporting.add_argument(
        "--tokenizer", type=Path, help="tokenizer folder to copy; of a save in a run: the one it trained with"
    )
    exporting.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), default="bf16", help="number format (bf16)")
    exporting.add_argument(
        "--chat-template",
        choices=("plain", "own"),
        help="User: and Assistant: lines, or the tokenizer's (the recipe's)",
    )
    exporting.set_defaults(run=_to_hf)

    verifying = commands.add_parser("verify", help="compare an export with the save it was made from")
    verifying.add_argument("save", metavar="SAVE", type=Path, help="as for to-hf")
    verifying.add_argument("hf", metavar="HF", type=Path, help="the export")
    verifying.set_defaults(run=_verify)

    for each in (importing, exporting):
        each.add_argument("--skip-verify", action="store_true", help="do not compare the result with what it came from")
    for each in (exporting, verifying):
        each.add_argument(
            "--config", metavar="HF", type=Path, help="of a plain Megatron checkpoint: a folder with its settings"
        )
    for each in (importing, exporting, verifying):
        each.add_argument(
            "--skip-logits", action="store_true", help="compare the weights, bit for bit, and run no model"
        )
        each.add_argument(
            "--text",
            metavar="FILE",
            type=_text_file,
            help="what both models read when they are compared (a text of ours)",
        )

    random = commands.add_parser("random-base", help="a base model of random weights in Hugging Face format")
    random.add_argument("recipe", metavar="RECIPE", help="path.py:function, or JSON, of a RandomBaseConfig or pipeline")
    random.set_defaults(run=_random_base)

    for each in (importing, exporting, verifying, random):
        each.add_argument(
            "--dry-run", action="store_true", help="check the input, say what would be done, write nothing"
        )
        each.add_argument("--json", action="store_true", help="machine output on stdout")
    for each in (importing, exporting, random):
        each.add_argument("--overwrite", action="store_true", help="replace OUT")
    return options


def _text_file(name: str) -> Path:
    if not Path(name).is_file():
        raise BadInput(f"no such file: {name}", fix="give --text a file of plain text, or leave it out")
    return Path(name)


def _from_hf(own: argparse.Namespace) -> None:
    from megatron_octo.convert import hf_folder, sample
    from megatron_octo.convert.from_hf import from_hf
    from megatron_octo.convert.hub_model import find_model
    from megatron_octo.convert.output import check_room, finished

    found = find_model(own.hf, own.revision, weights=False)
    hf = found.folder
    model = hf_folder.read_model_config(hf)
    if finished(own.output, "import", overwrite=own.overwrite) is None:
        check_room(own.output, hf_folder.num_bytes(model, "bf16"))  # or more; refused before a long download
    if own.dry_run and Path(own.hf).is_dir():
        hf_folder.Weights(hf).check(model)
    elif not own.dry_run:
        from_hf(
            find_model(own.hf, found.commit).folder,  # a branch may move meanwhile
            own.output,
            name=Path(own.hf).name,
            origin=f"{own.hf}@{found.commit}" if found.commit else "",
            verify=not own.skip_verify,
            text=own.text or sample.TEXT,
            logits=not own.skip_logits,
            overwrite=own.overwrite,
        )
    _say(own, model, output=own.output, source=hf)


def _to_hf(own: argparse.Namespace) -> None:
    from megatron_octo.convert import sample
    from megatron_octo.convert.hf_folder import num_bytes, read_tokenizer
    from megatron_octo.convert.output import check_room, finished
    from megatron_octo.convert.save import Save, find_save, model_of
    from megatron_octo.convert.to_hf import to_hf

    folder = find_save(own.save)
    model = model_of(folder, own.config)
    output = own.output or _default_output(folder, model)
    tokenizer = own.tokenizer or own.config or _default_tokenizer(folder)
    if own.dry_run:
        Save(folder, own.config)  # its tensors are those of the model
        if finished(output, "export", overwrite=own.overwrite) is None:
            check_room(output, num_bytes(model, own.dtype))
        read_tokenizer(tokenizer, model)
    else:
        to_hf(
            folder,
            output,
            tokenizer,
            dtype=own.dtype,
            config=own.config,
            chat_template=own.chat_template or _default_template(folder),
            verify=not own.skip_verify,
            text=own.text or sample.TEXT,
            logits=not own.skip_logits,
            overwrite=own.overwrite,
        )
    _say(own, model, output=output, source=folder, tokenizer=tokenizer, dtype=own.dtype)


def _verify(own: argparse.Namespace) -> None:
    from megatron_octo.convert import sample
    from megatron_octo.convert.save import Save, find_save
    from megatron_octo.convert.verify import REPORT, describe, verify

    folder, made = find_save(own.save), lineage.read_if_present(own.hf)
    into = own.hf if made is not None and made.kind == "export" else None  # what is not ours stays as it is
    if own.dry_run:
        _say(own, Save(folder, own.config).model, output=into / REPORT if into else "stdout", source=folder)
        return
    text = own.text or sample.TEXT
    report = verify(folder, own.hf, own.config, logits=not own.skip_logits, text=text, into=into)
    if own.json:
        console.emit_json(asdict(report))
    else:
        console.emit(describe(report))


def _random_base(own: argparse.Namespace) -> None:
    from megatron_octo.convert.random_base import random_base

    config = _random_base_config(own.recipe)
    if not own.dry_run:
        random_base(config, overwrite=own.overwrite)
    _say(own, config.model, output=config.output, seed=config.seed, tokenizer=config.tokenizer)


def _random_base_config(recipe: str) -> RandomBaseConfig:
    """The settings in a recipe or JSON file: a RandomBaseConfig, or a pipeline's."""
    from megatron_octo.config.base import Settings
    from megatron_octo.config.load import load_recipe
    from megatron_octo.config.pipeline import PipelineConfig, RandomBaseConfig

    if recipe.endswith(".json"):
        whole = "stable" in rundir.read_json(Path(recipe))
        settings: Settings = load_recipe(recipe, PipelineConfig if whole else RandomBaseConfig)
    else:
        settings = load_recipe(recipe, Settings)
    base = settings.base if isinstance(settings, PipelineConfig) else settings
    if not isinstance(base, RandomBaseConfig):
        raise BadInput(f"{recipe} describes no random base", fix="give a RandomBaseConfig, or a pipeline that has one")
    return base


def _default_output(save: Path, model: ModelConfig) -> Path:
    """hf/step_XXXXXXXX in the run's folder; of a Llama the name in front, as its licence asks."""
    from megatron_octo.convert.model_card import llama_version, name_of

    if save.parent.name != "checkpoints":
        raise BadInput(f"{save} is in no run folder, and no OUT is given", fix="say where to write: to-hf SAVE OUT")
    link = lineage.read(save)
    version = llama_version(link, model)
    name = save.name if version is None else f"{name_of(link, version)}-{save.name}"
    return save.parent.parent / "hf" / name


def _default_tokenizer(save: Path) -> Path:
    config = save / "config.json"
    if not config.exists():
        raise BadInput(f"{save} does not say which tokenizer it was trained with", fix="give --tokenizer FOLDER")
    return Path(rundir.read_json(config)["data"]["tokenizer"])


def _default_template(save: Path) -> ChatTemplate:
    """What the recipe of a run says; plain for an import."""
    config = save / "config.json"
    recipe = rundir.read_json(config) if config.exists() else {}
    template: ChatTemplate = recipe.get("save", {}).get("chat_template", "plain")
    return template


def _say(own: argparse.Namespace, model: ModelConfig, **facts: Any) -> None:
    """Print what was done, or would be."""
    facts = {key: str(value) for key, value in facts.items()} | {"num_parameters": model.num_parameters}
    if own.json:
        console.emit_json({"command": own.command, "dry_run": own.dry_run, **facts})
    elif own.dry_run:
        lines = "\n".join(f"  {key}: {value}" for key, value in facts.items())
        console.emit(f"would run {own.command}:\n{lines}")
    else:
        console.emit(facts["output"])
