"""`octo data generate | tokenizer | prepare | inspect | verify | merge | mix`: text to token ids on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import console
from megatron_octo.cli.options import at_least_one, parse_recipe, parser, recipe_parser
from megatron_octo.config.base import Settings, to_dict
from megatron_octo.config.data import PrepareConfig, SyntheticConfig, TokenizerConfig
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.errors import BadInput
from megatron_octo.rundir import is_written

if TYPE_CHECKING:
    from megatron_octo.data.manifest import Manifest
    from megatron_octo.data.mix import SourcePlan

ABOUT = {
    "generate": "Write the miniature's corpora and problems, drawn from a seed.",
    "tokenizer": "Train a SentencePiece tokenizer and write it as a Hugging Face folder.",
    "prepare": "Turn text into indexed token ids with a manifest, one folder a source.",
    "inspect": "Show a prepared data set: its manifest and some documents.",
    "verify": "Read a prepared data set whole and compare it with its manifest.",
    "merge": "Make one data set of several that were prepared alike.",
    "mix": "Show what a stage reads of each source: tokens, sequences, epochs.",
}


def parse(argv: Sequence[str]) -> str:
    """Which of the commands; refused if it is none."""
    lines = "\n".join(f"  {name:<11}{about}" for name, about in ABOUT.items())
    options = parser("data", f"From text to token ids on disk.\n\n{lines}\n\nocto data COMMAND --help says more.")
    options.add_argument("command", choices=ABOUT, metavar=" | ".join(ABOUT))
    command: str = options.parse_args(argv[:1]).command
    return command


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    run = {
        "generate": _generate,
        "tokenizer": _tokenizer,
        "prepare": _prepare,
        "inspect": _inspect,
        "verify": _verify,
        "merge": _merge,
        "mix": _mix,
    }
    run[parse(argv)](argv[1:])


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
    from megatron_octo.data.tokenizer_training import train_tokenizer

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
        _show_plan([_source_plan(config, done=config not in todo) for config in configs], own)
        return
    for config in todo:
        check(config)  # all of them before the first is written
    rows = [_summary(prepare(config, num_workers=own.workers), config.output) for config in configs]
    if own.json:
        console.emit_json(rows)
    else:
        columns = ("source", "documents", "tokens", "tokens/document", "rejected", "folder")
        console.table("prepared data sets", columns, [[_plain(each) for each in row.values()] for row in rows])


def _summary(manifest: Manifest, output: Path) -> dict[str, Any]:
    return {
        "source": manifest.config.name,
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


def _verify(argv: Sequence[str]) -> None:
    from megatron_octo.data.verify import verify

    options = parser("data verify", ABOUT["verify"])
    options.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="written by `octo data prepare`")
    options.add_argument("--json", action="store_true", help="machine output")
    own = options.parse_args(argv)
    rows = []
    for folder in own.folders:
        manifest = verify(folder)
        rows.append(_summary(manifest, folder))
        console.logger(__name__).info("%s: %s tokens are what the manifest says", folder, f"{manifest.tokens:,}")
    if own.json:
        console.emit_json(rows)


def _merge(argv: Sequence[str]) -> None:
    from megatron_octo.data.merge import merge

    options = parser("data merge", ABOUT["merge"])
    options.add_argument("output", metavar="OUTPUT", type=Path, help="the folder to write")
    options.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="written by `octo data prepare`")
    options.add_argument("--name", help="the source's name (default: the folder's)")
    options.add_argument("--json", action="store_true", help="machine output")
    own = options.parse_args(argv)
    summary = _summary(merge(own.output, own.folders, name=own.name or own.output.name), own.output)
    if own.json:
        console.emit_json(summary)
    else:
        console.table("merged data set", list(summary), [[_plain(each) for each in summary.values()]])


def _mix(argv: Sequence[str]) -> None:
    from megatron_octo.config.train import MidTrainConfig
    from megatron_octo.data.mix import check_repeats, plan
    from megatron_octo.data.mixture import read_mixture

    options = recipe_parser("data mix", ABOUT["mix"])
    options.add_argument("--json", action="store_true", help="machine output")
    kinds: tuple[type[MidTrainConfig | PipelineConfig], ...] = (MidTrainConfig, PipelineConfig)
    own, overrides = parse_recipe(options, argv, kinds)
    settings = load_recipe(own.recipe, kinds, overrides, command="octo data mix")
    stages = (settings.stable, *settings.branches) if isinstance(settings, PipelineConfig) else (settings,)
    plans = {}
    for stage in stages:
        mixture = read_mixture(stage.data, model_vocab_size=stage.model.vocab_size)
        plans[stage.name] = plan(stage.data, available=mixture.tokens, train_tokens=stage.budget.train_tokens)
    if own.json:
        console.emit_json({name: [_mix_row(each) for each in lines] for name, lines in plans.items()})
    else:
        for stage in stages:
            rows = [[_plain(each) for each in _mix_row(line).values()] for line in plans[stage.name]]
            title = f"{stage.name}: {stage.budget.train_tokens:,} tokens, sequences of {stage.data.seq_length:,}"
            console.table(title, list(_mix_row(plans[stage.name][0])), rows)
    for lines in plans.values():
        check_repeats(lines)


def _mix_row(each: SourcePlan) -> dict[str, Any]:
    return {
        "source": each.name,
        "weight": each.weight,
        "tokens": each.tokens,
        "sequences": each.sequences,
        "available": each.available,
        "epochs": round(each.epochs, 3),
        "max epochs": each.max_epochs,
    }


def _documents(own: argparse.Namespace, manifest: Manifest) -> list[dict[str, Any]]:
    from megatron_octo.data.indexed import read_documents
    from megatron_octo.data.tokenizer import load_tokenizer

    path = own.tokenizer or manifest.config.tokenizer
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        raise BadInput(
            f"data set {own.folder} was made with another tokenizer than {path}",
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
        workers = "processes that encode (default: one a core); the result is the same for any number"
        options.add_argument("--workers", metavar="N", type=at_least_one, help=workers)
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


def _source_plan(config: PrepareConfig, *, done: bool) -> dict[str, Any]:
    """What preparing a source takes, and of a corpus what its manifest states; nothing is asked of the Hub."""
    plan = _plan(config.output, done=done, inputs=[path for path in (config.input, config.tokenizer) if path])
    about: list[str] = []
    if config.hub:
        gated = ", gated (needs HF_TOKEN)" if config.hub.gated else ""
        about.append(f"{config.hub.repository} at {config.hub.revision}{gated}")
    if config.facts:
        about.append(f"licence {config.facts.licence}")
        if config.facts.download_bytes is not None:
            about.append(f"{config.facts.download_bytes / 1e9:,.1f} GB to download")
        if config.facts.expected_tokens is not None:
            about.append(f"about {config.facts.expected_tokens:,} tokens")
        about += [f"unconfirmed: {each}" for each in config.facts.unconfirmed]
    return {**plan, "about": about} if about else plan


def _show_plan(plans: Sequence[dict[str, Any]], own: argparse.Namespace) -> None:
    if own.json:
        console.emit_json(plans)
        return
    for plan in plans:
        missing = f"; not there yet: {', '.join(plan['missing_inputs'])}" if plan["missing_inputs"] else ""
        console.emit(f"{'done, skipped' if plan['done'] else 'would write'}: {plan['output']}{missing}")
        for line in plan.get("about", ()):
            console.emit(f"  {line}")


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
