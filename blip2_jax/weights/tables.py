"""Name tables: which tensor of a published checkpoint is which parameter here.

One table a family, used in both directions. A row pairs a parameter's path with a tensor's name;
`{i}` is the layer, which here is a leading axis of a stack. How one side's array becomes the
other's is a `KINDS` entry. Names are those of the bare model; a checkpoint may put a prefix before
all of them (`model.`, `vision_model.`), and the loader finds out which.
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
