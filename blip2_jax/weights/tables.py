"""Name tables: which tensor of a published checkpoint is which parameter here.

One table a family, used in both directions. A row pairs a parameter's path with a tensor's name;
`{i}` is the layer, which here is a leading axis of a stack. How one side's array becomes the
other's is a `KINDS` entry. Names are those of the bare model; a checkpoint may put a prefix before
all of them (`model.`, `vision_model.`), and the loader finds out which; a name with a leading
slash stands outside that prefix.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Kind:
    """How an array is stored: `load` makes ours of theirs, `save` theirs of ours.

    Both get the other side's shape, without the stack's leading axes.
    """

    load: Callable[[Array, tuple[int, ...]], Array]
    save: Callable[[Array, int], Array]


def _conv_to_linear(weight: Array, shape: tuple[int, ...]) -> Array:
    return weight.transpose(2, 3, 1, 0).reshape(shape)


def _linear_to_conv(kernel: Array, channels: int = 3) -> Array:
    side = round((kernel.shape[0] / channels) ** 0.5)
    return kernel.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)


KINDS = {
    "same": Kind(lambda x, shape: x.reshape(shape), lambda x, ndim: x.reshape(x.shape[-ndim:])),
    "linear": Kind(lambda x, _: x.T, lambda x, _: x.T),  # torch stores [out, in]
    "patches": Kind(_conv_to_linear, lambda x, _: _linear_to_conv(x)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of parameter: `ours` a path, `theirs` a tensor name; `ndim` of theirs."""

    ours: str
    theirs: str
    kind: str = "same"
    ndim: int = 1


def _linear(ours: str, theirs: str, bias: bool = True) -> tuple[Row, ...]:
    rows = (Row(f"{ours}/kernel", f"{theirs}.weight", "linear", 2),)
    return (*rows, Row(f"{ours}/bias", f"{theirs}.bias")) if bias else rows


def _norm(ours: str, theirs: str) -> tuple[Row, ...]:
    return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


def _embedding(ours: str, theirs: str) -> Row:
    return Row(f"{ours}/embedding", f"{theirs}.weight", ndim=2)


def opt_rows() -> tuple[Row, ...]:
    """`OPTForCausalLM`."""
    ours, theirs = "layers/blocks", "decoder.layers.{i}"
    rows = [
        _embedding("embed_tokens", "decoder.embed_tokens"),
        _embedding("embed_positions", "decoder.embed_positions"),
        *_norm("final_layer_norm", "decoder.final_layer_norm"),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rows += _linear(f"{ours}/self_attn/{name}", f"{theirs}.self_attn.{name}")
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        rows += _norm(f"{ours}/{name}", f"{theirs}.{name}")
    for name in ("fc1", "fc2"):
        rows += _linear(f"{ours}/mlp/{name}", f"{theirs}.{name}")
    return tuple(rows)


def _scale(ours: str, theirs: str) -> Row:
    return Row(f"{ours}/scale", f"{theirs}.weight")


def llama_rows() -> tuple[Row, ...]:
    """`LlamaForCausalLM`; a tied head has no row's parameter and is left out."""
    ours, theirs = "layers/blocks", "layers.{i}"
    rows = [
        _embedding("embed_tokens", "embed_tokens"),
        _scale("norm", "norm"),
        *_linear("lm_head", "/lm_head", bias=False),
        _scale(f"{ours}/input_norm", f"{theirs}.input_layernorm"),
        _scale(f"{ours}/post_attention_norm", f"{theirs}.post_attention_layernorm"),
    ]
    for name, part in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
        rows += _linear(f"{ours}/self_attn/{part}", f"{theirs}.self_attn.{name}_proj", bias=False)
    for name in ("gate", "up", "down"):
        rows += _linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}_proj", bias=False)
    return tuple(rows)


def t5_rows() -> tuple[Row, ...]:
    """`T5ForConditionalGeneration`, v1.1."""
    rows = [
        _embedding("embed_tokens", "shared"),
        *_linear("lm_head", "lm_head", bias=False),
    ]
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    for side, feed_forward in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{side}/blocks", f"{side}.block.{{i}}.layer"
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
        rows += [
            _embedding(f"{side}_relative_bias", first),
            _scale(f"{side}_norm", f"{side}.final_layer_norm"),
            _scale(f"{ours}/self_attn_norm", f"{theirs}.0.layer_norm"),
            _scale(f"{ours}/mlp_norm", f"{theirs}.{feed_forward}.layer_norm"),
        ]
        for name, part in zip("qkvo", parts, strict=True):
            self_attention = f"{theirs}.0.SelfAttention.{name}"
            rows += _linear(f"{ours}/self_attn/{part}", self_attention, bias=False)
        for name, part in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            dense = f"{theirs}.{feed_forward}.DenseReluDense.{name}"
            rows += _linear(f"{ours}/mlp/{part}", dense, bias=False)
    rows.append(_scale("decoder/blocks/cross_attn_norm", "decoder.block.{i}.layer.1.layer_norm"))
    for name, part in zip("qkvo", parts, strict=True):
        cross = f"decoder.block.{{i}}.layer.1.EncDecAttention.{name}"
        rows += _linear(f"decoder/blocks/cross_attn/{part}", cross, bias=False)
    return tuple(rows)


def clip_vision_rows() -> tuple[Row, ...]:
    """`CLIPVisionModel`; its `post_layernorm` has no part in BLIP-2."""
    ours, theirs = "layers/blocks", "encoder.layers.{i}"
    rows = [
        Row("cls_token", "embeddings.class_embedding"),
        Row("pos_embed", "embeddings.position_embedding.weight", ndim=2),
        Row("patch_embed/kernel", "embeddings.patch_embedding.weight", "patches", 4),
        *_norm("ln_pre", "pre_layrnorm"),  # spelled so in the checkpoints
    ]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rows += _linear(f"{ours}/attn/{name}", f"{theirs}.self_attn.{name}")
    for number in (1, 2):
        rows += _norm(f"{ours}/norm{number}", f"{theirs}.layer_norm{number}")
        rows += _linear(f"{ours}/mlp/fc{number}", f"{theirs}.mlp.fc{number}")
    return tuple(rows)
