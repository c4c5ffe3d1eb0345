"""Pre-training of the embedded world's image encoder, on labeled images.

Every patch is classified by what stands there (which digit, which color, which size, or nothing).
The heads are thrown away; BLIP-2 sees the encoder's patch features only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from blip2_jax.models import blip2
from blip2_jax.models.layers import linear
from blip2_jax.models.vit import ViT, ViTConfig
from blip2_jax.stages import flops, losses
from blip2_jax.stages.step import Batch, Metrics, Params, Spec

TOWER = "vit"
AXES = ((r"heads/[^/]+/(kernel|bias)$", (None,)), *blip2.AXES)


class PatchClassifier(nnx.Module):
    """A ViT with one linear head an attribute on its patch tokens: for pre-training it.

    Args:
      labels: attribute -> number of classes.
    """

    def __init__(
        self, config: ViTConfig, labels: dict[str, int], *, dtype: Any = None, rngs: nnx.Rngs
    ):
        self.vit = ViT(config, dtype=dtype, rngs=rngs)
        self.heads = nnx.Dict(
            {n: linear(config.hidden_size, c, dtype=dtype, rngs=rngs) for n, c in labels.items()}
        )

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """uint8[B, H, W, 3] -> attribute -> float[B, G * G, classes]."""
        patches = self.vit(images)[:, 1:]
        return {name: head(patches) for name, head in self.heads.items()}


def make_module(config: ConfigDict, sizes: ViTConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """See `stages.Stage`."""
    return PatchClassifier(sizes, dict(config.stage.labels), dtype=dtype, rngs=rngs)


def loss_fn(
    params: Params, frozen: Params, batch: Batch, key: jax.Array | None, *, spec: Spec
) -> tuple[jax.Array, Metrics]:
    """Sum of the patch-wise cross-entropies of all attributes.

    Args:
      params: `vit` and its heads; frozen: nothing.
      batch: `image` uint8[B, H, W, 3], and for each attribute of `spec.stage.labels` the classes
        of the patches, int32[B, G * G], row by row; the last class is the background.
      key: unused, there is no dropout.
      spec: what the recipe decides.
    """
    del key
    model: PatchClassifier = spec.merge(params, frozen)
    logits = model(batch["image"])
    metrics: Metrics = {}
    total: float | jax.Array = 0.0
    for name, classes in spec.stage.labels.items():
        labels = batch[name]
        total += losses.cross_entropy(logits[name], labels).mean()
        hits = logits[name].argmax(axis=-1) == labels
        metrics[f"{name}/accuracy"] = losses.weighted_mean(hits, labels < classes - 1)
    loss = jnp.asarray(total)
    return loss, {"loss": loss, **metrics}


def flops_per_sample(config: ConfigDict, sizes: ViTConfig) -> dict[str, flops.Flops]:
    """The encoder, and a linear head for each attribute."""
    heads = flops.linear(sizes.grid**2, sizes.hidden_size, sum(config.stage.labels.values()))
    return {"vit": flops.vit(sizes).flops(trained=True), "heads": heads.flops(trained=True)}
