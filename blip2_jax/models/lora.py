"""Low-rank adaptation of a frozen language model (Hu et al. 2021): W x + (alpha / rank) B A x.

A and B live in the layers that they adapt. As parameters they are a part of their own, `llm_lora`,
so that they are trained, placed and saved like any other part while `llm` stays frozen and keeps
its fingerprint. `merge` adds them into the weights, after which nothing of them is left.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from blip2_jax.models.blip2 import Blip2Stage2
from blip2_jax.models.layers import Linear, normal

TOWER, PART = "llm", "llm_lora"
LEAVES = ("lora_a", "lora_b")

Params = dict[str, Any]


def add(
    model: Blip2Stage2, *, rank: int, alpha: float, targets: Sequence[str], rngs: nnx.Rngs
) -> None:
    """Gives linear layers of `model.llm` a low-rank path; B is zero, so that nothing changes yet.

    Args:
      model: a stage-2 model.
      rank: the inner width.
      alpha: the path is multiplied by alpha / rank.
      targets: names of the layers, e.g. ("q_proj", "v_proj"), wherever they are in the model.
      rngs: randomness of A, which starts as wide as torch's linear layers (as in PEFT).

    Raises:
      ValueError: a rank or alpha that is not positive, or a name that no layer has.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"config.model.llm.lora has rank {rank} and alpha {alpha}; both are > 0.")
    layers = {path: layer for path, layer in nnx.iter_graph(model.llm) if isinstance(layer, Linear)}
    missing = set(targets) - {path[-1] for path in layers}
    if missing or not targets:
        names = sorted({str(path[-1]) for path in layers})
        raise ValueError(
            f"config.model.llm.lora.targets is {tuple(targets)}; this language model has the "
            f"linear layers {names}."
        )
    for path, layer in layers.items():
        if path[-1] in targets:
            *stack, d_in, d_out = layer.kernel.shape
            start = normal((3 * d_in) ** -0.5)(rngs.params(), (*stack, d_in, rank))
            layer.lora_a = nnx.Param(start)
            layer.lora_b = nnx.Param(jnp.zeros((*stack, rank, d_out)))
            layer.lora_scale = alpha / rank


def partition(params: Params) -> Params:
    """Moves A and B out of `llm` into `llm_lora`, under the same names."""
    if TOWER not in params:
        return params
    weights, low_rank = _split(params[TOWER])
    parts = {**params, TOWER: weights}
    return {**parts, PART: low_rank} if low_rank else parts


def combine(params: Params) -> Params:
    """Undoes `partition`."""
    if PART not in params:
        return params
    rest = {key: value for key, value in params.items() if key != PART}
    return {**rest, TOWER: _combine(params[TOWER], params[PART])}


def merge(params: Params, *, rank: int, alpha: float) -> Params:
    """Adds the low-rank paths into the weights, in float32; the result is a model without them."""
    if PART not in params:
        return params
    rest = {key: value for key, value in params.items() if key != PART}
    return {**rest, TOWER: _merge(params[TOWER], params[PART], alpha / rank)}


def _split(tree: Params) -> tuple[Params, Params]:
    """The tree without A and B, and A and B alone."""
    weights: Params = {}
    low_rank: Params = {}
    for name, value in tree.items():
        if name in LEAVES:
            low_rank[name] = value
        elif isinstance(value, dict):
            weights[name], below = _split(value)
            if below:
                low_rank[name] = below
        else:
            weights[name] = value
    return weights, low_rank


def _combine(tree: Params, low_rank: Params) -> Params:
    merged = dict(tree)
    for name, value in low_rank.items():
        merged[name] = value if name in LEAVES else _combine(tree[name], value)
    return merged


def _merge(tree: Params, low_rank: Params, scale: float) -> Params:
    if "lora_a" in low_rank:
        kernel = tree["kernel"]
        change = jnp.matmul(low_rank["lora_a"], low_rank["lora_b"], precision="highest") * scale
        return {**tree, "kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
    return {
        name: _merge(value, low_rank[name], scale) if name in low_rank else value
        for name, value in tree.items()
    }
