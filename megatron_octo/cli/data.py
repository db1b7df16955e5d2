"""`octo data generate | tokenizer | prepare | inspect`: text to token ids on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import console
from megatron_octo.cli.options import parse_recipe, parser, recipe_parser
from megatron_octo.config.base import Settings, to_dict
from megatron_octo.config.data import PrepareConfig, SyntheticConfig, TokenizerConfig
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.errors import BadInput
from megatron_octo.rundir import is_written

if TYPE_CHECKING:
    from megatron_octo.data.manifest import Manifest

ABOUT = {
    "generate": "Write the miniature's corpora and problems, drawn from a seed.",
    "tokenizer": "Train a SentencePiece tokenizer and write it as a Hugging Face folder.",
    "prepare": "Turn text into indexed token ids with a manifest, one folder a source.",
    "inspect": "Show a prepared data set: its manifest and some documents.",
}


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    lines = "\n".join(f"  {name:<11}{about}" for name, about in ABOUT.items())
    options = parser("data", f"From text to token ids on disk.\n\n{lines}\n\nocto data COMMAND --help says more.")
    options.add_argument("command", choices=ABOUT, metavar=" | ".join(ABOUT))
    command = options.parse_args(argv[:1]).command
    run = {"generate": _generate, "tokenizer": _tokenizer, "prepare": _prepare, "inspect": _inspect}[command]
    run(argv[1:])


def _generate(argv: Sequence[str]) -> None:
    own, settings = _load("generate", SyntheticConfig, argv)
    config = settings.corpora if isinstance(settings, PipelineConfig) else settings
    if not isinstance(config, SyntheticConfig):
        raise BadInput(f"{own.recipe} generates no corpora", fix="set `corpora` in the pipeline")
    if own.dry_run:
        _show_plan([_plan(config.output, done=is_written(config.output, to_dict(config)), inputs=())], own)
        return
    from megatron_octo.data.synthetic import generate

    generate(config)
    if own.json:
        console.emit_json({"output": config.output, "documents": dict(config.documents)})


def _tokenizer(argv: Sequence[str]) -> None:
    own, settings = _load("tokenizer", TokenizerConfig, argv)
    config = settings.tokenizer if isinstance(settings, PipelineConfig) else settings
    if not isinstance(config, TokenizerConfig):
        raise BadInput(f"{own.recipe} trains no tokenizer", fix="set `tokenizer` in the pipeline")
    if own.dry_run:
        inputs = [each.input for each in config.inputs]
        _show_plan([_plan(config.output, done=is_written(config.output, to_dict(config)), inputs=inputs)], own)
        return
    from megatron_octo.data.manifest import tokenizer_sha256
    from megatron_octo.data.tokenizer import train_tokenizer

    train_tokenizer(config)
    if own.json:
        console.emit_json(
            {"output": config.output, "vocab_size": config.vocab_size, "sha256": tokenizer_sha256(config.output)}
        )


def _prepare(argv: Sequence[str]) -> None:
    from megatron_octo.data.prepare import check, is_prepared, prepare

    own, settings = _load("prepare", PrepareConfig, argv)
    configs = _sources(settings, own)
    todo = [config for config in configs if not is_prepared(config)]
    if own.dry_run:
        _show_plan([_plan(c.output, done=c not in todo, inputs=(c.input, c.tokenizer)) for c in configs], own)
        return
    for config in todo:
        check(config)  # all of them before the first is written
    rows = [_summary(prepare(config), config.output) for config in configs]
    if own.json:
        console.emit_json(rows)
    else:
        columns = ("source", "documents", "tokens", "tokens/document", "rejected", "folder")
        console.table("prepared data sets", columns, [[_plain(each) for each in row.values()] for row in rows])


def _summary(manifest: Manifest, output: Path) -> dict[str, Any]:
    return {
        "source": manifest.name,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "tokens_per_document": round(manifest.tokens / manifest.documents, 1),
        "rejected": manifest.rejected,
        "output": output,
    }


def _inspect(argv: Sequence[str]) -> None:
    from megatron_octo.data.manifest import read_manifest

    options = parser("data inspect", ABOUT["inspect"])
    options.add_argument("folder", metavar="FOLDER", type=Path, help="a folder that `octo data prepare` wrote")
    options.add_argument("--documents", metavar="N", type=int, default=3, help="documents to show as text")
    options.add_argument("--tokenizer", type=Path, help="its tokenizer's folder, where it has moved")
    options.add_argument("--json", action="store_true", help="machine output")
    own = options.parse_args(argv)
    manifest = read_manifest(own.folder)
    documents = _documents(own, manifest) if own.documents > 0 else []
    if own.json:
        console.emit_json({"manifest": to_dict(manifest), "documents": documents})
        return
    console.table(f"data set {own.folder}", ("field", "value"), _rows(to_dict(manifest)))
    for number, each in enumerate(documents):
        console.emit(f"document {number}, {each['tokens']} tokens\n{each['text']}\n")


def _documents(own: argparse.Namespace, manifest: Manifest) -> list[dict[str, Any]]:
    from megatron_octo.data.indexed import read_documents
    from megatron_octo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(own.tokenizer or manifest.tokenizer.path)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        raise BadInput(
            f"data set {own.folder} was made with another tokenizer than {own.tokenizer or manifest.tokenizer.path}",
            fix="give its tokenizer's folder (--tokenizer), or no text (--documents 0)",
        )
    ids: list[list[int]] = []
    for prefix in manifest.prefixes(own.folder):
        ids += read_documents(prefix, own.documents - len(ids))
    return [{"tokens": len(each), "text": tokenizer.decode(each)} for each in ids]


def _load[S: Settings](
    command: str, kind: type[S], argv: Sequence[str]
) -> tuple[argparse.Namespace, S | PipelineConfig]:
    """(own options, the stage's settings or those of the pipeline that it is in)."""
    options = recipe_parser(f"data {command}", ABOUT[command])
    options.add_argument("--dry-run", action="store_true", help="say what would be written; touch nothing")
    options.add_argument("--json", action="store_true", help="machine output")
    if command == "prepare":
        options.add_argument("--source", metavar="NAME", nargs="+", help="of a pipeline's sources, these only")
    kinds: tuple[type[S | PipelineConfig], ...] = (kind, PipelineConfig)
    own, overrides = parse_recipe(options, argv, kinds)
    return own, load_recipe(own.recipe, kinds, overrides, command=f"octo data {command}")


def _sources(settings: Settings, own: argparse.Namespace) -> tuple[PrepareConfig, ...]:
    configs = settings.prepare if isinstance(settings, PipelineConfig) else (settings,)
    found = {config.name: config for config in configs if isinstance(config, PrepareConfig)}
    wanted = own.source or list(found)
    for name in wanted:
        if name not in found:
            raise BadInput(f"{own.recipe} has no source {name!r}", fix=f"choose among: {', '.join(found) or 'none'}")
    if not wanted:
        raise BadInput(f"{own.recipe} prepares no source", fix="set `prepare` in the pipeline")
    return tuple(found[name] for name in wanted)


def _plan(output: Path, *, done: bool, inputs: Sequence[Path]) -> dict[str, Any]:
    missing = [] if done else [str(path) for path in inputs if not path.exists()]
    return {"output": str(output), "done": done, "missing_inputs": missing}


def _show_plan(plans: Sequence[dict[str, Any]], own: argparse.Namespace) -> None:
    if own.json:
        console.emit_json(plans)
        return
    for plan in plans:
        missing = f"; not there yet: {', '.join(plan['missing_inputs'])}" if plan["missing_inputs"] else ""
        console.emit(f"{'done, skipped' if plan['done'] else 'would write'}: {plan['output']}{missing}")


def _rows(value: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested values as (dotted name, value)."""
    rows: list[tuple[str, object]] = []
    for key, each in value.items():
        parts = dict(enumerate(each)) if isinstance(each, list) else each
        if isinstance(parts, dict):
            rows += _rows({str(k): v for k, v in parts.items()}, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _plain(each)))
    return rows


def _plain(value: object) -> object:
    return f"{value:,}" if type(value) is int else value
