"""Train and eval steps of any stage's loss, and the spec that both close over."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from blip2_jax.models import lora
from blip2_jax.runtime.optim import apply_gradients

Params = dict[str, Any]  # nested dict of arrays; top-level keys name towers and parts
State = dict[str, Any]  # {"step", "bad_steps", "params", "opt_state"}: see `runtime.state`
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is fixed for a run: no arrays, nothing that changes from step to step.

    Attributes:
      graph: the model without its parameters.
      optimizer: see `runtime.optim`.
      schedule: learning rate of a step number, for the log.
      stage: the config's `stage` section, options of the loss.
      mesh: the devices; what a step must move between them by hand, it moves on these.
    """

    graph: nnx.GraphDef[Any]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    stage: FrozenConfigDict
    mesh: Mesh

    def merge(self, params: Params, frozen: Params) -> Any:
        """The model with its parameters in place: a module of the stage's own class.

        The merge is shallow, which is right because a top-level key is trained or frozen as a
        whole; a key on both sides is an error (a shallow merge would hide one of them).
        """
        both = params.keys() & frozen.keys()
        if both:
            raise ValueError(f"Trained and frozen at once: {', '.join(sorted(both))}.")
        return nnx.merge(self.graph, lora.combine({**frozen, **params}))


LossFn = Callable[..., tuple[jax.Array, Metrics]]

# A metric of losses that are means: how much the mean is over (its tokens). Where it is there, a
# batch may be computed in parts.
WEIGHT = "tokens"


def train_step(
    loss_fn: LossFn, state: State, frozen: Params, batch: Batch, key: jax.Array, *, spec: Spec
) -> tuple[State, Metrics]:
    """One step of gradient descent on a stage's loss. Pure; jit it with `state` donated.

    Only `state["params"]` is differentiated: frozen parameters get neither gradient nor slot.

    Args:
      loss_fn: (params, frozen, batch, key, *, spec) -> (loss, metrics), as in every stage.
      state: see `State`; the step counter also seeds the step's randomness.
      frozen: parameters that do not change.
      batch: global arrays.
      key: the run's key; folded with the step number here.
      spec: see `Spec`.

    Returns:
      The new state, and the metrics of the loss with norms, learning rate and the number of bad
      steps so far added. A step whose loss or gradient is not finite changes no parameter.
    """
    key = jax.random.fold_in(key, state["step"])
    gradient = jax.grad(functools.partial(loss_fn, spec=spec), has_aux=True)
    parts = spec.stage.accumulate
    if parts == 1:
        grads, metrics = gradient(state["params"], frozen, batch, key)
    else:
        grads, metrics = _accumulated(gradient, state["params"], frozen, batch, key, parts)
    rate = spec.schedule(state["step"] - state["bad_steps"])  # the optimizer's own count
    state, norms = apply_gradients(state, grads, spec.optimizer, metrics["loss"])
    # Counted over the whole run.
    return state, {**metrics, **norms, "learning_rate": rate, "bad_steps": state["bad_steps"]}


def eval_step(
    loss_fn: LossFn, params: Params, frozen: Params, batch: Batch, *, spec: Spec
) -> Metrics:
    """The metrics of a stage's loss without dropout, with fixed negatives."""
    return loss_fn(params, frozen, batch, None, spec=spec)[1]


def _accumulated(
    gradient: Callable[..., Any],
    params: Params,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
    parts: int,
) -> tuple[Params, Metrics]:
    """Gradients and metrics of a batch that is computed in parts.

    Parts are weighted by their tokens, so that the result is that of the whole batch. Example i
    goes to part i mod `parts`: every device splits its own examples, and sends none.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def body(total: Any, part: Any) -> tuple[Any, jax.Array]:
        examples, key = part
        grads, metrics = gradient(params, frozen, examples, key)
        if WEIGHT not in metrics:
            raise ValueError(
                "config.stage.accumulate is above 1, but the loss of this stage is over the whole "
                "batch at once (its contrast needs all pairs): --config.stage.accumulate=1."
            )
        weight = metrics[WEIGHT]
        weighted = jax.tree.map(lambda x: x.astype(jnp.float32) * weight, (grads, metrics))
        return jax.tree.map(jnp.add, total, weighted), weight

    examples = jax.tree.map(split, batch)
    keys = jax.random.split(key, parts)
    first = jax.tree.map(lambda x: x[0], (examples, keys))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        jax.eval_shape(gradient, params, frozen, *first),
    )
    (grads, metrics), weights = jax.lax.scan(body, zeros, (examples, keys))
    total = jnp.maximum(weights.sum(), 1e-9)
    grads, metrics = jax.tree.map(lambda x: x / total, (grads, metrics))
    return grads, {**metrics, WEIGHT: total}
