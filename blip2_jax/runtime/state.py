"""The train state, its shapes and shardings, and a fingerprint of any tree of arrays.

State is a plain dict, `{"step": int32[], "bad_steps": int32[], "params": trainable, "opt_state":
optax state}`; `bad_steps` of the `step` steps so far were not finite and changed nothing. Frozen
parameters are never part of it: they are an argument of their own to the step.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from blip2_jax.runtime.mesh import flatten_with_names, replicated

InitParams = Callable[[jax.Array], Any]


def init_state(
    init_params_fn: InitParams, tx: optax.GradientTransformation, key: jax.Array
) -> dict[str, Any]:
    """A fresh train state; pure, so that it can be jitted with `out_shardings`.

    Args:
      init_params_fn: key -> trainable parameters.
      tx: the optimizer.
      key: a `jax.random.key`.
    """
    params = init_params_fn(key)
    return {
        "step": jnp.zeros((), jnp.int32),
        "bad_steps": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": tx.init(params),
    }


def abstract_state(init_params_fn: InitParams, tx: optax.GradientTransformation) -> dict[str, Any]:
    """The shapes and dtypes of `init_state`, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k: init_state(init_params_fn, tx, k), key)


def state_shardings(
    abstract: Mapping[str, Any],
    param_shardings: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
) -> dict[str, Any]:
    """Shardings of the state: moments are placed as their parameter, counters are replicated."""
    whole = replicated(mesh)
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        abstract["opt_state"],
        param_shardings,
        transform_non_params=lambda _: whole,
    )
    return {
        "step": whole,
        "bad_steps": whole,
        "params": param_shardings,
        "opt_state": opt_state,
    }


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct`s with shardings, as `Checkpointer.restore` takes."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def split_by_keys(
    params: Mapping[str, Any], trainable_keys: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters by top-level key into (trainable, frozen).

    Raises:
      ValueError: a key that is not there; a typo would otherwise silently freeze a tower.
    """
    unknown = sorted(set(trainable_keys) - set(params))
    if unknown:
        raise ValueError(
            f"Cannot train {unknown}: the model has the parts {sorted(params)}. Set "
            "--config.trainable to some of them."
        )
    trainable = {key: value for key, value in params.items() if key in trainable_keys}
    frozen = {key: value for key, value in params.items() if key not in trainable_keys}
    return trainable, frozen


def fingerprint(tree: Any) -> str:
    """A hash of every bit of a tree, its paths, shapes and dtypes.

    Each element's bits are mixed with its position and summed modulo 2**32, on the device that
    holds it: integer sums do not depend on their order, so the result is the same on any mesh, and
    no array is sent. Two sums with different mixings make 64 bits for each leaf.

    Args:
      tree: arrays of any real dtype, on host or devices.

    Returns:
      64 hexadecimal digits (SHA-256).
    """
    named = flatten_with_names(tree)
    sums = jax.device_get(_leaf_sums([leaf for _, leaf in named]))
    digest = hashlib.sha256()
    for (path, leaf), (first, second) in zip(named, sums, strict=True):
        shape = "x".join(map(str, np.shape(leaf)))
        line = f"{path} {shape} {jnp.dtype(leaf.dtype).name} {int(first):08x}{int(second):08x}\n"
        digest.update(line.encode())
    return digest.hexdigest()


@jax.jit
def _leaf_sums(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return [(_position_sum(x, 0x9E3779B9), _position_sum(x, 0x85EBCA77)) for x in leaves]


def _position_sum(x: jax.Array, seed: int) -> jax.Array:
    """Sum over elements of mix(bits ^ mix(position ^ seed)), uint32[]."""
    bits = _as_uint32(x)
    position = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position + index * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(position ^ np.uint32(seed))), dtype=jnp.uint32)


def _as_uint32(x: jax.Array) -> jax.Array:
    """The bits of each element; 64-bit elements become two words in a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = jnp.dtype(x.dtype).itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection on 32 bits in which each bit moves all others.

    A bijection, so one changed element always changes the sum; and unlike a plain product, it has
    no weak spot for values such as 1.0 and 2.0, whose low bits are all zero.
    """
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
