"""What stands beside the weights of an export: README.md, and what the licence of the base asks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.budget import ledger
from megatron_octo.convert.verify import REPORT
from megatron_octo.lineage import copy_licence
from megatron_octo.model.mapping import LLAMA, family_of
from megatron_octo.rundir import write_atomic

if TYPE_CHECKING:
    from megatron_octo.config.model import ModelConfig
    from megatron_octo.lineage import Lineage

CARD = "README.md"
LICENCE, NOTICE = "LICENSE", "NOTICE"
LLAMA3_ROWS = range(128_256, 131_072)
"""Rows of the embedding of Llama 3 and what follows it, where some were added too; from 131,072 on it is another's."""
BY_FACTOR = {8.0: ("3.1", "3.3"), 32.0: ("3.2",)}
"""Versions of Llama by the factor of their rotary scaling; the first one where the name tells none of them."""
NAMED = re.compile(r"llama-?(?:(2)|(3)(?:[._-]?([123]))?)(?![\db])")
"""A version in a name, which is no number of parameters."""


def write(folder: Path, link: Lineage, model: ModelConfig, *, save: Path, base: Path, dtype: str) -> None:
    """Write the files into `folder`, the export of `save`; it and `base` may hold the licence to copy."""
    version = llama_version(link, model)
    for each in (base, save):
        copy_licence(each, folder)
    if version is not None:
        terms = f"Llama {version} Community License"
        page = f"https://www.llama.com/llama{version.replace('.', '_')}/license/"
        if not _copied(folder):
            write_atomic(folder / LICENCE, f"{terms}\n\nThe text is at {page}\n")
        _add_notice(
            folder / NOTICE,
            f"Llama {version} is licensed under the {terms},\n"
            "Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n",
        )
        licence = f"Built with Llama. The licence of the base, the [{terms}]({page}), applies to this model too.\n\n"
    else:
        licence = f"Licence: that of the base, {link.chain()[0].name}{_copied(folder)}.\n\n"
    write_atomic(folder / CARD, _card(name_of(link, version), licence, link, dtype, _proof(folder)) + _ledger(save))


def _add_notice(path: Path, notice: str) -> None:
    """Put a notice behind those that the base came with."""
    before = path.read_text() if path.exists() else ""
    if notice not in before:
        write_atomic(path, f"{before}\n{notice}" if before else notice)


def llama_version(link: Lineage, model: ModelConfig) -> str | None:
    """`3.2` where the model descends from Meta's Llama 3.2, and so on; None where from no Llama."""
    base = link.chain()[0].name.lower()
    is_llama3 = family_of(model) is LLAMA and model.vocab_size in LLAMA3_ROWS
    if "llama" not in base and not is_llama3:
        return None
    found = NAMED.search(base)
    named = ".".join(filter(None, found.groups())) if found else None
    possible = BY_FACTOR.get(model.rope_factor or 0.0)
    if possible:
        return named if named in possible else possible[0]
    return named or ("3" if is_llama3 else None)


def name_of(link: Lineage, version: str | None) -> str:
    """The model's name; that of a Llama begins with Llama, as its licence asks."""
    return link.name if version is None or link.name.startswith("Llama") else f"Llama-{version}-{link.name}"


def _copied(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob(f"{LICENCE}*"))
    return f" (see {', '.join(names)})" if names else ""


def _proof(folder: Path) -> str:
    if not (folder / REPORT).exists():
        return "Not verified: it was not compared with the Megatron model that it was converted from."
    return f"`{REPORT}` holds the comparison with the Megatron model that it was converted from."


def _ledger(save: Path) -> str:
    """What the last run read of each source; nothing for an import."""
    if not (save / ledger.FILE).exists():
        return ""
    sources = ledger.read_ledger(save).sources
    rows = "\n".join(f"| {each.name} | {each.consumed:,} | {each.epochs:.2f} |" for each in sources)
    return f"\n| source | tokens read | epochs |\n|---|---|---|\n{rows}\n"


def _card(name: str, licence: str, link: Lineage, dtype: str, proof: str) -> str:
    chain = link.chain()
    trained = [each for each in chain if each.kind == "train"]
    origin = f", {chain[0].origin} on the Hugging Face Hub" if chain[0].origin else ""
    facts = [f"* base: {chain[0].name}{origin}"]
    facts += [f"* {'stable run' if each is trained[0] else 'branch'}: {each.name}" for each in trained]
    rows = "\n".join(
        f"| {each.kind} | {each.name} | {'' if each.step is None else each.step} | {each.tokens:,} | "
        f"`{each.weights_sha256[:12]}` |"
        for each in chain
    )
    return (
        f"# {name}\n\n"
        f"{licence}"
        f"Made by megatron_octo: Stable-then-Decay mid-training, then `octo convert to-hf --dtype {dtype}`.\n"
        f"{proof}\n\n"
        f"{'\n'.join(facts)}\n\n"
        "| made by | name | step | tokens trained | weights |\n|---|---|---|---|---|\n"
        f"{rows}\n"
    )
