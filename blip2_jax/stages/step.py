"""What the train steps of all stages have in common: the spec they close over, and one update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from blip2_jax.runtime.optim import apply_gradients

Params = dict[str, Any]  # nested dict of arrays; top-level keys name towers and parts
State = dict[str, Any]  # {"step": int32[], "params": Params, "opt_state": optax state}
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

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    stage: FrozenConfigDict
    mesh: Mesh

    def merge(self, params: Params, frozen: Params) -> nnx.Module:
        """The model with its parameters in place.

        The merge is shallow, which is right because a top-level key is trained or frozen as a
        whole; a key on both sides is an error (a shallow merge would hide one of them).
        """
        both = params.keys() & frozen.keys()
        if both:
            raise ValueError(f"Trained and frozen at once: {', '.join(sorted(both))}.")
        return nnx.merge(self.graph, {**frozen, **params})


LossFn = Callable[..., tuple[jax.Array, Metrics]]


def update(
    loss_fn: LossFn, state: State, frozen: Params, batch: Batch, key: jax.Array, *, spec: Spec
) -> tuple[State, Metrics]:
    """One step of gradient descent on `loss_fn`, whose signature is every stage's.

    Only `state["params"]` is differentiated: frozen parameters get neither gradient nor slot.

    Args:
      loss_fn: (params, frozen, batch, key, *, spec) -> (loss, metrics).
      state: see `State`; the step counter also seeds the step's randomness.
      frozen: parameters that do not change.
      batch: global arrays.
      key: the run's key; folded with the step number here.
      spec: see `Spec`.

    Returns:
      The new state, and the metrics of the loss with norms and learning rate added.
    """
    key = jax.random.fold_in(key, state["step"])
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], frozen, batch, key, spec=spec)
    rate = spec.schedule(state["step"])
    state, norms = apply_gradients(state, grads, spec.optimizer)
    return state, {**metrics, **norms, "learning_rate": rate}
