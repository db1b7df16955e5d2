"""One table, both directions: Hugging Face names and shapes <-> those of a megatron save.

A save stacks a layer's tensor over all layers along a leading axis, uses the same keys at every
parallel layout and for both layer implementations, and joins matrices that are multiplied together.
A new family is one more `Family`. Nothing here reads or writes files, or imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_octo.config.base import from_dict
from megatron_octo.config.model import ModelConfig
from megatron_octo.errors import BadInput

if TYPE_CHECKING:
    import torch

LAYERS = "decoder.layers."
"""Start of the keys of a layer's tensors, which hold all layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One tensor of a save and the Hugging Face tensors it is made of."""

    key: str
    """Key in the save."""
    parts: tuple[tuple[str, str], ...]
    """(Hugging Face name, axes). `{layer}` is the layer's number; axes are letters: h hidden, q query
    heads x head_dim, k KV heads x head_dim, d head_dim, f inner width of the MLP, v vocabulary."""
    by_group: bool = False
    """Join the parts within each query group ([q heads of the group; k; v], then the next group) instead of whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a Hugging Face `model_type` looks like on both sides."""

    model_type: str
    """As in config.json."""
    architecture: str
    """The class that transformers and vLLM look up."""
    rows: tuple[Row, ...]
    """All tensors but the output layer."""
    fixed: dict[str, tuple[Any, str]]
    """Fields of config.json that must have one value, and why."""
    defaults: dict[str, Any]
    """What transformers takes where config.json is silent, and differs between families."""
    qkv_bias: bool = False
    """As in ModelConfig; with `qk_norm` it tells the families apart."""
    qk_norm: bool = False
    """As in ModelConfig."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A `Row` of one layer of one model, with numbers for letters."""

    key: str
    """Key in the save."""
    layer: int | None
    """Index along the leading axis of the save's tensor; None for a tensor outside the layers."""
    shape: tuple[int, ...]
    """Shape in megatron's model (without the layer axis)."""
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """(Hugging Face name, shape), in the order they are joined in."""
    num_groups: int
    """Groups that the parts are joined in; 1 for whole."""

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hugging Face's tensors, in the order of `parts` -> megatron's."""
        import torch

        rows = self.rows(parts)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def rows(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The rows of `join`'s result, as pieces of the parts one after the other: views, not copies."""
        groups = [part.reshape(self.num_groups, -1, *self.shape[1:]) for part in parts]
        return [group[number] for number in range(self.num_groups) for group in groups]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Megatron's tensor -> Hugging Face's, in the order of `parts`; the inverse of `join`."""
        return [self.part(tensor, index) for index in range(len(self.parts))]

    def part(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """One of `split`'s tensors."""
        rows = [shape[0] // self.num_groups for _, shape in self.parts]
        pieces = tensor.reshape(self.num_groups, -1, *self.shape[1:]).split(rows, dim=1)
        return pieces[index].reshape(self.parts[index][1])


def weights(model: ModelConfig) -> Iterator[Weight]:
    """Every tensor of a model: the embedding, the layers one after the other, the rest.

    Raises:
        BadInput: no family is like the model.
    """
    family = family_of(model)
    outside = [row for row in family.rows if not row.key.startswith(LAYERS)]
    inside = [row for row in family.rows if row.key.startswith(LAYERS)]
    if not model.tied_embeddings:
        outside.append(OUTPUT)
    yield _weight(outside[0], model, None)
    for layer in range(model.num_layers):
        for row in inside:
            yield _weight(row, model, layer)
    for row in outside[1:]:
        yield _weight(row, model, None)


def family_of(model: ModelConfig) -> Family:
    """The family whose checkpoints hold what the model has.

    Raises:
        BadInput: there is none.
    """
    for family in FAMILIES.values():
        if (family.qkv_bias, family.qk_norm) == (model.qkv_bias, model.qk_norm):
            return family
    raise BadInput(
        "model.qkv_bias and model.qk_norm are both on: no Hugging Face family here has both",
        fix="switch one of them off",
    )


def stacked_shape(weight: Weight, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the save's tensor that `weight` is (a layer of)."""
    return weight.shape if weight.layer is None else (model.num_layers, *weight.shape)


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model in Hugging Face format."""
    return {name: shape for weight in weights(model) for name, shape in weight.parts}


def model_config_from_hf(config: dict[str, Any], *, origin: str = "config.json") -> ModelConfig:
    """Settings of the model that a Hugging Face `config.json` describes.

    Raises:
        BadInput: the model is of another family, or has a feature that the training side cannot
            express; `origin` is named in the message.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=1)
        raise BadInput(
            f"{origin}: model_type {kind!r} is not supported",
            fix=f"{f'did you mean {near[0]!r}? ' if near else ''}supported: {', '.join(FAMILIES)}",
        )
    named, architecture = config.get("architectures"), FAMILIES[kind].architecture
    if named and architecture.lower() not in str(named).lower():
        raise BadInput(
            f"{origin}: a {kind} of the architectures {named} is not supported", fix=f"give a model of {architecture}"
        )
    try:
        return _read(FAMILIES[kind], config, origin)
    except KeyError as error:
        raise BadInput(f"{origin} has no {error.args[0]!r}", fix="give the model's own config.json, whole") from None


def hf_config(
    model: ModelConfig,
    *,
    dtype: str,
    bos: int | None = None,
    eos: int | list[int] | None = None,
    pad: int | None = None,
) -> dict[str, Any]:
    """The `config.json` of a model, `dtype` as torch names it (`bfloat16`); transformers 4 and 5 and vLLM read it."""
    family = family_of(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **_write(family, model),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _weight(row: Row, model: ModelConfig, layer: int | None) -> Weight:
    sizes = {
        "h": model.hidden_size,
        "q": model.num_heads * model.head_dim,
        "k": model.num_kv_heads * model.head_dim,
        "d": model.head_dim,
        "f": model.ffn_size,
        "v": model.vocab_size,
    }
    parts = tuple((name.format(layer=layer), tuple(sizes[axis] for axis in axes)) for name, axes in row.parts)
    return Weight(
        key=row.key,
        layer=layer,
        shape=(sum(shape[0] for _, shape in parts), *parts[0][1][1:]),
        parts=parts,
        num_groups=model.num_kv_heads if row.by_group else 1,
    )


# ---- config.json

ROPE_LOW, ROPE_HIGH, ROPE_ORIGINAL = 1.0, 4.0, 8192
"""megatron-core's Llama-3 rotary scaling has these built in; only the factor is an argument."""


def _read(family: Family, config: dict[str, Any], origin: str) -> ModelConfig:
    for name, (wanted, why) in family.fixed.items():
        value = config.get(name, wanted)
        if value != wanted:
            raise BadInput(f"{origin}: {name} is {value!r}: {why}", fix=f"choose a model whose {name} is {wanted!r}")
    config = {**family.defaults, **config}
    heads, kv_heads, head_dim = config["num_attention_heads"], config.get("num_key_value_heads"), config.get("head_dim")
    theta, factor = _read_rope(config, origin)
    values = {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "ffn_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "head_dim": 0 if head_dim is None else head_dim,
        "rope_theta": theta,
        "rope_factor": factor,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_positions": config["max_position_embeddings"],
        "init_std": config.get("initializer_range", 0.02),
    }
    model = from_dict(ModelConfig, values, origin=origin, strict=True)
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * model.num_layers:
        raise BadInput(
            f"{origin}: layer_types {kinds}: every layer sees all positions before it",
            fix="choose a model whose layers all have full_attention",
        )
    return model


def _read_rope(config: dict[str, Any], origin: str) -> tuple[Any, Any]:
    """(theta, factor): `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of before."""
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        stated = config.get(name) or {}
        if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
            raise BadInput(
                f"{origin}: {name} is {stated!r}: all layers have the same rotary scaling, in one table",
                fix="choose a model whose rotary scaling is the same in all layers",
            )
        rope |= {name: value for name, value in stated.items() if value is not None}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadInput(
            f"{origin}: partial_rotary_factor is {rope['partial_rotary_factor']!r}: whole heads are rotated",
            fix="choose a model whose partial_rotary_factor is 1",
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return rope["rope_theta"], None
    if kind != "llama3":
        raise BadInput(
            f"{origin}: rotary scaling of type {kind!r}: megatron-core's GPTModel knows none and Llama 3's",
            fix="choose a model without rotary scaling, or with type 'llama3'",
        )
    wanted = {
        "low_freq_factor": ROPE_LOW,
        "high_freq_factor": ROPE_HIGH,
        "original_max_position_embeddings": ROPE_ORIGINAL,
    }
    for name, value in wanted.items():
        if rope[name] != value:
            raise BadInput(
                f"{origin}: rotary scaling with {name} {rope[name]!r}: megatron-core has {value:g} built in",
                fix="choose a model with Llama 3's values",
            )
    return rope["rope_theta"], rope["factor"]


def _write(family: Family, model: ModelConfig) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": model.rope_factor,
        "low_freq_factor": ROPE_LOW,
        "high_freq_factor": ROPE_HIGH,
        "original_max_position_embeddings": ROPE_ORIGINAL,
    }
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_size,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling if model.rope_factor else None,
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        **{name: value for name, (value, _) in family.fixed.items() if value is not None},
    }


# ---- the families

EMBEDDING = Row(key="embedding.word_embeddings.weight", parts=(("model.embed_tokens.weight", "vh"),))
LLAMA_ROWS = (
    EMBEDDING,
    Row(
        key="decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        parts=(("model.layers.{layer}.input_layernorm.weight", "h"),),
    ),
    Row(
        key="decoder.layers.self_attention.linear_qkv.weight",
        parts=(
            ("model.layers.{layer}.self_attn.q_proj.weight", "qh"),
            ("model.layers.{layer}.self_attn.k_proj.weight", "kh"),
            ("model.layers.{layer}.self_attn.v_proj.weight", "kh"),
        ),
        by_group=True,
    ),
    Row(
        key="decoder.layers.self_attention.linear_proj.weight",
        parts=(("model.layers.{layer}.self_attn.o_proj.weight", "hq"),),
    ),
    Row(
        key="decoder.layers.mlp.linear_fc1.layer_norm_weight",
        parts=(("model.layers.{layer}.post_attention_layernorm.weight", "h"),),
    ),
    Row(
        key="decoder.layers.mlp.linear_fc1.weight",
        parts=(
            ("model.layers.{layer}.mlp.gate_proj.weight", "fh"),
            ("model.layers.{layer}.mlp.up_proj.weight", "fh"),
        ),
    ),
    Row(key="decoder.layers.mlp.linear_fc2.weight", parts=(("model.layers.{layer}.mlp.down_proj.weight", "hf"),)),
    Row(key="decoder.final_layernorm.weight", parts=(("model.norm.weight", "h"),)),
)
QKV_BIAS = Row(
    key="decoder.layers.self_attention.linear_qkv.bias",
    parts=(
        ("model.layers.{layer}.self_attn.q_proj.bias", "q"),
        ("model.layers.{layer}.self_attn.k_proj.bias", "k"),
        ("model.layers.{layer}.self_attn.v_proj.bias", "k"),
    ),
    by_group=True,
)
QK_NORMS = (
    Row(
        key="decoder.layers.self_attention.q_layernorm.weight",
        parts=(("model.layers.{layer}.self_attn.q_norm.weight", "d"),),
    ),
    Row(
        key="decoder.layers.self_attention.k_layernorm.weight",
        parts=(("model.layers.{layer}.self_attn.k_norm.weight", "d"),),
    ),
)
OUTPUT = Row(key="output_layer.weight", parts=(("lm_head.weight", "vh"),))
"""The output layer; absent where the embedding is used for it."""

_ALL_FIXED = {
    "hidden_act": ("silu", "the MLP is SwiGLU"),
    "quantization_config": (None, "weights are read as numbers, not as quantised blocks"),
}
_NO_BIAS = {"attention_bias": (False, "the attention has no bias")}
_ALL_POSITIONS = {
    "use_sliding_window": (False, "every layer sees all positions before it"),
    "dual_chunk_attention_config": (None, "every layer sees all positions before it"),
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=LLAMA_ROWS,
    fixed={**_ALL_FIXED, **_NO_BIAS, "mlp_bias": (False, "the MLP has no bias")},
    defaults={"max_position_embeddings": 2048},
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=(*LLAMA_ROWS, QKV_BIAS),
    fixed={**_ALL_FIXED, **_ALL_POSITIONS},
    defaults={"max_position_embeddings": 32_768},
    qkv_bias=True,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(*LLAMA_ROWS, *QK_NORMS),
    fixed={**_ALL_FIXED, **_ALL_POSITIONS, **_NO_BIAS},
    defaults={"max_position_embeddings": 32_768, "head_dim": 128},
    qk_norm=True,
)
FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3)}
