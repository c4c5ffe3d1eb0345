"""AdamW, its learning rate schedule and its weight decay, as LAVIS trains BLIP-2.

What is decayed follows LAVIS `BaseModel.get_optimizer_params`: everything except 1-D parameters
and names ending in `bias`. Our layers are stacked, so a LayerNorm scale is `float32[L, D]` here;
the decision is therefore by name first and by shape second.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from blip2_jax.runtime.mesh import flatten_with_names

# The last part of a path that means "one number per channel", stacked or not.
NORM_SCALES = ("scale",)
TEMPERATURES = ("temp", "temperature", "logit_scale")


def make_optimizer(
    config_optim: Mapping[str, Any],
    abstract_params: Any,
    scales: Any = None,
    vectors: Collection[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with linear warmup and cosine decay.

    Args:
      config_optim: what `make_schedule` reads, and `betas` (two numbers), `eps`, `weight_decay`,
        `clip_norm` (global norm; 0 = no clipping), `decay_biases`, `decay_temperature` (bools;
        LAVIS: False, True).
      abstract_params: the trainable parameters, arrays or `jax.ShapeDtypeStruct`s.
      scales: factors on each parameter's learning rate, a tree like them, or None.
      vectors: see `decay_mask`.

    Returns:
      The optimizer, and the schedule `step -> learning rate` for the log.
    """
    schedule = make_schedule(config_optim)
    beta1, beta2 = config_optim["betas"]
    mask = decay_mask(
        abstract_params,
        decay_biases=config_optim["decay_biases"],
        decay_temperature=config_optim["decay_temperature"],
        vectors=vectors,
    )
    parts = [
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=config_optim["eps"]),
        optax.add_decayed_weights(config_optim["weight_decay"], mask),
        optax.scale_by_learning_rate(schedule),
    ]
    if scales is not None:
        parts.append(_scale_each(scales))
    if config_optim["clip_norm"] < 0:
        raise ValueError(f"config.optim.clip_norm is {config_optim['clip_norm']}; 0 turns it off.")
    if config_optim["clip_norm"]:
        parts.insert(0, optax.clip_by_global_norm(config_optim["clip_norm"]))
    return optax.chain(*parts), schedule


def _scale_each(scales: Any) -> optax.GradientTransformation:
    """Multiplies each parameter's update, weight decay included, as its own rate would."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scales))


def make_schedule(config_optim: Mapping[str, Any]) -> optax.Schedule:
    """The learning rate of a step, by `config_optim["schedule"]`.

    - "per_step": linear from `warmup_start_lr` to `peak_lr` in `warmup_steps`, then a half cosine
      to `end_lr` at `total_steps`. A step is the only unit of time, as in the paper (section 3.4),
      so streams without epochs work.
    - "per_epoch": what LAVIS trains with (`LinearWarmupCosineLRScheduler`). The linear warmup
      holds in the first epoch alone, however far it has come there. From the second epoch on the
      rate is the cosine's at the epoch's start, for the whole epoch; the cosine begins at step 0
      and would reach `end_lr` with the epoch after the last.

    Args:
      config_optim: `schedule`, `peak_lr`, `warmup_start_lr`, `end_lr`, `warmup_steps`,
        `total_steps` and, for "per_epoch", `steps_per_epoch`.

    Raises:
      ValueError: an unknown schedule, a warmup that leaves nothing of the run, or no length of an
        epoch.
    """
    kind = config_optim["schedule"]
    if kind not in SCHEDULES:
        raise ValueError(f"config.optim.schedule is {kind!r}; known: {', '.join(SCHEDULES)}.")
    return SCHEDULES[kind](config_optim)


def _per_step(config_optim: Mapping[str, Any]) -> optax.Schedule:
    warmup, total = config_optim["warmup_steps"], config_optim["total_steps"]
    if not 0 <= warmup < total:
        raise ValueError(
            f"config.optim.warmup_steps is {warmup} and config.steps is {total}; the warmup must "
            f"be shorter than the run. For a short run: --config.optim.warmup_steps={total // 10}."
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=config_optim["warmup_start_lr"],
        peak_value=config_optim["peak_lr"],
        warmup_steps=warmup,
        decay_steps=total,
        end_value=config_optim["end_lr"],
    )


def _per_epoch(config_optim: Mapping[str, Any]) -> optax.Schedule:
    start, peak, end = (config_optim[k] for k in ("warmup_start_lr", "peak_lr", "end_lr"))
    warmup, length = config_optim["warmup_steps"], config_optim["steps_per_epoch"]
    if length < 1 or warmup < 0:
        raise ValueError(
            f"config.optim.steps_per_epoch is {length} and warmup_steps is {warmup}; "
            "schedule='per_epoch' needs at least 1 and 0. For a run without epochs take "
            "config.optim.schedule='per_step'."
        )
    epochs = -(-config_optim["total_steps"] // length)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        epoch = jnp.minimum(jnp.asarray(step) // length, epochs)
        warm = jnp.minimum(peak, start + (peak - start) * (step / max(warmup, 1)))
        cosine = end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * epoch / epochs))
        return jnp.where(epoch == 0, warm, cosine)

    return schedule


SCHEDULES: dict[str, Callable[[Mapping[str, Any]], optax.Schedule]] = {
    "per_step": _per_step,
    "per_epoch": _per_epoch,
}


def decay_mask(
    params: Any, *, decay_biases: bool, decay_temperature: bool, vectors: Collection[str] = ()
) -> Any:
    """True where weight decay applies; a tree of bools like `params`.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      decay_biases, decay_temperature: whether these are decayed.
      vectors: paths ("a/b/c") of parameters that are not decayed because they are 1-D in the model
        that they are from, and have another shape here.

    Raises:
      ValueError: no parameter at all, as an empty trainable set is always a mistake.
    """
    named = flatten_with_names(params)
    if not named:
        raise ValueError("There is nothing to train: the tree of trainable parameters is empty.")
    mask = [
        path not in vectors and _is_decayed(path, leaf, decay_biases, decay_temperature)
        for path, leaf in named
    ]
    return jax.tree.unflatten(jax.tree.structure(params), mask)


def _is_decayed(path: str, leaf: Any, decay_biases: bool, decay_temperature: bool) -> bool:
    name = path.rsplit("/", 1)[-1]
    if name in TEMPERATURES:
        return decay_temperature
    if name.endswith("bias"):
        return decay_biases
    return name not in NORM_SCALES and len(leaf.shape) != 1


def apply_gradients(
    state: dict[str, Any], grads: Any, tx: optax.GradientTransformation, loss: jax.Array
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """One optimizer step, unless the loss or the gradient is not finite.

    Such a step changes neither parameters nor optimizer (nor its place in the schedule); it is
    counted in `bad_steps`. The decision is made on the device: no step waits for it.

    Args:
      state: {"step", "bad_steps", "params", "opt_state"}.
      grads: like `state["params"]`.
      tx: the optimizer.
      loss: what the gradient is of, float[].

    Returns:
      The next state, and the global L2 norms of the gradient (before clipping), of the update and
      of the new parameters: `grad_norm`, `update_norm`, `param_norm`, float32[].
    """
    grad_norm = optax.tree.norm(grads)
    # The norm is not finite if any gradient is not, nor if their squares overflow.
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    before = {"params": state["params"], "opt_state": state["opt_state"]}
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    after = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
    norms = {
        "grad_norm": grad_norm,
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(kept["params"]),
    }
    bad_steps = state["bad_steps"] + jnp.where(good, 0, 1)
    return {"step": state["step"] + 1, "bad_steps": bad_steps, **kept}, norms
