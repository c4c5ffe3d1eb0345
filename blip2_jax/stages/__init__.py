"""What is learned: losses and steps, of both stages and of others that `STAGES` names.

Each stage is a module of the form that `Stage` describes; `step` makes train and eval steps of
their losses, the same for all stages.
"""

from importlib import import_module
from typing import Any, Protocol, cast

from flax import nnx
from ml_collections import ConfigDict

# Stage -> its module, which is imported when a recipe asks for it.
STAGES = {
    "stage1": "blip2_jax.stages.stage1",
    "stage2": "blip2_jax.stages.stage2",
    "pretrain_vit": "blip2_jax.digits.pretrain_vit",
    "pretrain_lm": "blip2_jax.digits.pretrain_lm",
}


class Stage(Protocol):
    """A stage's module.

    Attributes:
      TOWER: "vit" or "llm", where the stage trains this tower alone; "" where it trains a BLIP-2.
      loss_fn: pure (params, frozen, batch, key, *, spec) -> (loss, metrics), which knows nothing of
        devices; `key` is None outside training.
      AXES: which axes its parameters have; only where `models.blip2.AXES` does not cover them.
    """

    TOWER: str
    loss_fn: Any

    def make_module(
        self, config: ConfigDict, sizes: Any, *, dtype: Any, rngs: nnx.Rngs
    ) -> nnx.Module:
        """The model that is trained, with fresh parameters; `sizes`: `Recipe.model_config`."""

    def flops_per_sample(self, config: ConfigDict, sizes: Any) -> dict[str, Any]:
        """Tower or part -> `flops.Flops` of one sample in one train step."""


def load(name: str) -> Stage:
    """The module of `config.stage.name`; ValueError where there is no such stage."""
    if name not in STAGES:
        raise ValueError(f"config.stage.name is {name!r}; known: {', '.join(STAGES)}.")
    return cast(Stage, import_module(STAGES[name]))
