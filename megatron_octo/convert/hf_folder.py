"""Hugging Face model folders: config.json, safetensors, tokenizer files. Streams: one tensor in memory."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_octo import console
from megatron_octo.convert import safetensors_file
from megatron_octo.convert.output import MAX_FILE_BYTES, into_files, write_files
from megatron_octo.convert.safetensors_file import Named
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping
from megatron_octo.rundir import read_object, write_atomic, write_json

if TYPE_CHECKING:
    import torch

    from megatron_octo.config.model import ModelConfig

Dtype = Literal["bf16", "fp32", "fp16"]
TORCH_NAMES: dict[Dtype, str] = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = "*.safetensors"

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
)

CONTROL = ("bos", "eos", "pad")

PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- set names = {"user": "User", "assistant": "Assistant", "system": "System"} %}
{%- for message in messages %}
{{- "" if loop.first else "\\n" }}{{- names[message["role"]] + ":" + message["content"] }}
{%- endfor %}
{{- "\\nAssistant:" if add_generation_prompt }}"""
"""Turns as `User:` and `Assistant:` on lines of their own, as the template `chat` of `octo data` writes them."""


class Weights:
    """The tensors of a folder's safetensors, single or sharded, by name; or those of one file."""

    def __init__(self, folder: Path) -> None:
        """Read names and shapes; `folder` may be one file.

        Raises:
            BadInput: no safetensors, or a file that the index names is missing.
        """
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        if folder.is_file():
            files = [folder]
        elif (folder / INDEX).exists():
            if (folder / SINGLE).exists():
                raise BadInput(
                    f"{folder} holds two models: {SINGLE}, and that of {INDEX}",
                    fix="take one away; transformers loads the first, whatever the second is",
                )
            files = sorted({folder / file for file in _weight_map(folder / INDEX).values()})
        else:
            files = sorted(folder.glob(WEIGHT_FILES))
        if not files:
            raise BadInput(
                f"{folder} holds no {WEIGHT_FILES}",
                fix="give a model in safetensors (transformers' save_pretrained writes them)",
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._dtypes: dict[str, str] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - it is not a dict
                        if name in self.shapes:
                            raise BadInput(
                                f"{name} is in two files of {folder}: {self._files[name].name} and {file.name}",
                                fix="take away the files that are not the model's",
                            )
                        part = tensors.get_slice(name)
                        self._files[name] = file
                        self.shapes[name], self._dtypes[name] = tuple(part.get_shape()), part.get_dtype()
            except (OSError, SafetensorError) as error:
                raise BadInput(f"{file} cannot be read: {error}", fix="download or write the folder again") from None

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor.

        Raises:
            BadInput: it is neither fp32, bf16 nor fp16.
        """
        import torch

        known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        if self._dtypes[name] not in known:
            raise BadInput(f"{self.folder}: {name} is {self._dtypes[name]}", fix="give weights in fp32, bf16 or fp16")
        return known[self._dtypes[name]]

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._files[name]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    def check(self, model: ModelConfig) -> None:
        """Compare names and shapes with those that `model` has, and a tied output layer with the embedding.

        Raises:
            BadInput: one is missing, one too many, or of another shape; or the output layer is not the embedding.
        """
        (embedding, _), (output, _) = mapping.EMBEDDING.parts[0], mapping.OUTPUT.parts[0]
        wanted = mapping.hf_shapes(model)
        # older exports hold the rotary frequencies, and the tied output layer, though both follow from the rest
        extra = {n for n in self.shapes.keys() - wanted.keys() if not n.endswith(".rotary_emb.inv_freq")}
        extra -= {output} if model.tied_embeddings else set()
        wrong = [
            f"{name} is {self.shapes[name]}, the model has {shape}"
            for name, shape in wanted.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        wrong += [f"{name} is missing" for name in wanted.keys() - self.shapes.keys()]
        wrong += [f"{name} is unknown" for name in extra]
        if wrong:
            shown = "\n".join(f"  {line}" for line in sorted(wrong)[:10])
            raise BadInput(
                f"{self.folder}: {len(wrong)} tensors do not fit its {CONFIG}:\n{shown}",
                fix="give the folder's own config.json and all of its weight files",
            )
        if model.tied_embeddings and output in self.shapes and not self._are_same(embedding, output):
            raise BadInput(
                f"{self.folder}: {CONFIG} ties the output layer, but {output} differs from {embedding}",
                fix=f"set tie_word_embeddings to false in {CONFIG}, or take {output} out of the weights",
            )

    def _are_same(self, first: str, second: str) -> bool:
        import torch

        if (self.shapes[first], self._dtypes[first]) != (self.shapes[second], self._dtypes[second]):
            return False
        return torch.equal(*(self.read(name).view(torch.uint8) for name in (first, second)))  # NaN is NaN


def _weight_map(index: Path) -> dict[str, str]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) and file for file in names.values()):
        raise BadInput(f"{index} has no weight_map of tensors and files", fix="download or write the folder again")
    if elsewhere := [file for file in names.values() if Path(file).name != file]:
        raise BadInput(f"{index} names {elsewhere[0]!r}", fix="put all weight files into the model's folder itself")
    return names


def write_weights(
    folder: Path,
    tensors: Iterable[Sequence[Named]],
    dtype: Dtype,
    *,
    check: Callable[[Weights], None] = lambda weights: None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> str:
    """Write safetensors: one file, or numbered ones with an index where they would exceed `max_file_bytes`.

    Tensors of one sequence are written into one file; all are made in their order. `check` hears of each file once it
    is written. A file that is in `folder` already is whole, and stays. Returns one SHA-256 over the files.
    """
    import torch

    torch_dtype: torch.dtype = getattr(torch, TORCH_NAMES[dtype])

    def size(tensors: Iterable[Named]) -> int:
        return sum(each.num_bytes(torch_dtype) for each in tensors)

    groups = [list(itertools.chain(*group)) for group in into_files(tensors, size, max_file_bytes)]
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    files = dict(zip(names if len(names) > 1 else [SINGLE], groups, strict=True))
    total = sum(map(size, groups))
    there = sum(size(group) for name, group in files.items() if (folder / name).exists())
    with console.byte_meter("write weights", total) as wrote:
        wrote(there)
        digest = write_files(
            folder,
            list(files),
            lambda path: safetensors_file.write(path, files[path.name], torch_dtype, wrote=wrote),
            lambda path: check(Weights(path)),
        )
    if len(files) > 1:
        weight_map = {tensor.name: name for name, group in files.items() for tensor in group}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digest


def num_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """What the weights of a model take in `dtype`."""
    return model.num_parameters * (4 if dtype == "fp32" else 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """What a model folder needs to know of a tokenizer folder."""

    folder: Path
    bos: int | None
    eos: int | list[int] | None
    """Ids that end an answer; a generation_config.json beside the tokenizer knows best."""
    pad: int | None

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's files."""
        for name in TOKENIZER_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists()


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder; code that lies beside it is not run.

    Raises:
        BadInput: it cannot be loaded, or not without that code.
    """
    import transformers

    try:
        kind = transformers.PreTrainedTokenizerFast if _is_plain(folder) else transformers.AutoTokenizer
        return kind.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of many kinds, for files that are JSON and make no sense
        raise BadInput(
            f"the tokenizer in {folder} cannot be loaded: {error}",
            fix="give all files of a tokenizer, whole; one that needs code of its own is not supported",
        ) from None


def _is_plain(folder: Path) -> bool:
    """Whether AutoTokenizer, whose import takes seconds, would choose the class that knows tokenizer.json alone."""
    settings, model = (
        read_object(path) if (path := folder / name).exists() else {} for name in ("tokenizer_config.json", CONFIG)
    )
    named = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return named and model.get("model_type", "llama") == "llama"


def read_tokenizer(folder: Path, model: ModelConfig) -> Tokenizer:
    """Load a tokenizer folder to learn its control ids, and check that the model has a row for each id.

    Raises:
        BadInput: no tokenizer there, none that can be loaded, or more ids than the model has rows, or a wrong id.
    """
    if not has_tokenizer(folder):
        raise BadInput(f"{folder} holds no tokenizer.json and no tokenizer.model", fix="give a tokenizer folder")
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.vocab_size:
        raise BadInput(
            f"tokenizer {folder} has {len(tokenizer):,} ids, the model {model.vocab_size:,} rows",
            fix="give the tokenizer that the model was trained with",
        )
    stated = read_object(folder / GENERATION) if (folder / GENERATION).exists() else {}
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in CONTROL}
    ids |= {name: stated[f"{name}_token_id"] for name in CONTROL if stated.get(f"{name}_token_id") is not None}
    for name, value in ids.items():
        each = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int and 0 <= one < model.vocab_size for one in each):
            raise BadInput(
                f"{folder / GENERATION}: {name}_token_id is {value!r}, the model has {model.vocab_size:,} rows",
                fix=f"correct it, or take {GENERATION} away: the tokenizer has ids of its own",
            )
    return Tokenizer(folder=folder, **ids)


def write_settings(folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: Dtype) -> None:
    """Write config.json, generation_config.json and the tokenizer's files: all of a model folder but its weights."""
    ids: dict[str, Any] = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    write_json(folder / CONFIG, mapping.hf_config(model, dtype=TORCH_NAMES[dtype], **ids))
    stated = {f"{name}_token_id": value for name, value in ids.items() if value is not None}
    write_json(folder / GENERATION, stated)
    tokenizer.copy_to(folder)


def write_plain_template(folder: Path) -> None:
    """Give the tokenizer in `folder` the plain chat template, in place of its own."""
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        write_json(settings, {name: value for name, value in read_object(settings).items() if name != "chat_template"})
    write_atomic(folder / CHAT_TEMPLATE, PLAIN_TEMPLATE)


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder, from its config.json.

    Raises:
        BadInput: no config.json, or a model that training cannot express.
    """
    return mapping.model_config_from_hf(read_object(folder / CONFIG), origin=str(folder / CONFIG))
