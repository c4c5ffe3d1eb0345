"""Vision transformers that BLIP-2 freezes: EVA-CLIP's ViT-g/14 and CLIP's ViT-L/14 are two configs.

Both return the residual stream of their last kept block for all tokens, class token first; the
published models drop the final block and have no final norm here: `ln_vision`, which BLIP-2
trains, stands outside (LAVIS `eva_vit.py`, `clip_vit.py`; the paper's section 3).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip2_jax.models import layers
from blip2_jax.models.attention import Attention
from blip2_jax.models.layers import MLP, Stack, layer_norm, linear, normal, split_key

# Mean and standard deviation of RGB in 0..1: CLIP's, used by BLIP-2 with both encoders.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

AXES = (
    *layers.AXES,
    (r"patch_embed/kernel$", (None, "embed")),
    (r"patch_embed/bias$|(cls_token|pos_embed)$", (None,)),
)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer; the defaults are the truncated EVA-CLIP ViT-g/14's."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1408
    num_layers: int = 39
    num_heads: int = 16
    mlp_dim: int = 6144
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_bias: str = "qvo"  # EVA has no key bias; CLIP: "qkvo"
    patch_bias: bool = True  # CLIP: False
    pre_norm: bool = False  # CLIP's ln_pre, on the embeddings
    align_corners: bool = False  # how positions are resampled for another image size; CLIP: True
    drop_path: float = 0.0  # share of branches left out in training, in the last block
    remat: str = "none"
    # How pixels become numbers: value / 255, less the mean, over the deviation, by channel.
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    resample: str = "bicubic"  # how images are resized; see `data.transforms`
    # Resize the shorter side to so many pixels, and cut out the middle; 0: squeeze the whole image
    # into the square, as BLIP-2 does.
    shortest_edge: int = 0

    @property
    def grid(self) -> int:
        """Patches along one side; pixels beyond the last whole one are not read."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N: all patches and the class token."""
        return self.grid**2 + 1


def normalize_images(
    images: jax.Array, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> jax.Array:
    """uint8[B, H, W, 3] in 0..255 -> float32[B, H, W, 3], less the mean, over the deviation."""
    center, scale = jnp.array(mean, jnp.float32), jnp.array(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - center) / scale


class ViTBlock(nnx.Module):
    """Self-attention and a feed-forward, each after its LayerNorm, with residuals."""

    def __init__(self, config: ViTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        width = config.hidden_size

        def norm() -> nnx.LayerNorm:
            return layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)

        self.norm1 = norm()
        self.attn = Attention(
            width, config.num_heads, bias=config.attention_bias, dtype=dtype, rngs=rngs
        )
        self.norm2 = norm()
        self.mlp = MLP(width, config.mlp_dim, activation=config.activation, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, rate: jax.Array | float = 0.0, key: jax.Array | None = None
    ) -> jax.Array:
        """One block; with a key, each branch of each image is left out with probability `rate`."""
        k1, k2 = split_key(key, 2)
        x = x + drop_path(self.attn(self.norm1(x)), rate, k1)
        return x + drop_path(self.mlp(self.norm2(x)), rate, k2)


def drop_path(x: jax.Array, rate: jax.Array | float, key: jax.Array | None) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): whole examples of float[B, ...] are left out."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (len(x), *[1] * (x.ndim - 1)))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class ViT(nnx.Module):
    """Images in, one vector a patch (and a class token) out."""

    def __init__(self, config: ViTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        if config.image_size < config.patch_size:
            raise ValueError(
                f"image_size {config.image_size} is less than patch_size {config.patch_size}."
            )
        self.config = config
        width = config.hidden_size
        # A convolution whose stride equals its kernel is a product over flattened patches.
        self.patch_embed = linear(
            3 * config.patch_size**2, width, bias=config.patch_bias, dtype=dtype, rngs=rngs
        )
        self.cls_token = nnx.Param(normal(0.02)(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(normal(0.02)(rngs.params(), (1, config.num_tokens, width)))
        if config.pre_norm:
            self.ln_pre = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.layers = Stack(
            lambda r: ViTBlock(config, dtype=dtype, rngs=r),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Encodes images.

        Args:
          images: uint8[B, H, W, 3], of the config's size; normalized here, on the device.
          key: randomness of drop path, or None.

        Returns:
          float[B, N, D]: the residual stream after the last block, class token first.
        """
        size, patch, grid = self.config.image_size, self.config.patch_size, self.config.grid
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"Images are {images.shape[1:]}; the encoder reads {(size, size, 3)}.")
        images = images[:, : grid * patch, : grid * patch]
        x = normalize_images(images, self.config.image_mean, self.config.image_std)
        x = x.reshape(-1, grid, patch, grid, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid**2, 3 * patch**2)
        x = self.patch_embed(x)
        cls = jnp.broadcast_to(self.cls_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls.astype(x.dtype), x], axis=1) + self.pos_embed[...].astype(x.dtype)
        if self.config.pre_norm:
            x = self.ln_pre(x)
        rate, depth = self.config.drop_path, self.config.num_layers
        if not rate:
            key = None
        rates = jnp.linspace(0.0, rate, depth) if key is not None else jnp.zeros(depth)
        x, _ = self.layers(lambda block, x, layer: (block(x, *layer), None), x, rates, key=key)
        return x


def vectors(config: ViTConfig) -> tuple[str, ...]:
    """Parameters that are 1-D in the encoder they are from: CLIP's class token, not EVA-CLIP's."""
    return ("cls_token",) if config.pre_norm else ()


def layer_scales(params: Any, decay: float) -> Any:
    """Factors on the learning rate of each parameter of a ViT, smaller for earlier layers.

    decay ** (L + 1 - n) with n = 0 for the embeddings and n = i + 1 for block i, so the last block
    has decay ** 1 (LAVIS `blip2_models/blip2.py`, which computes them and never applies them).

    Args:
      params: the ViT's parameters, blocks stacked.
      decay: 1 or less; 1 leaves all as they are.

    Returns:
      The same tree with float32 arrays that broadcast against the parameters.
    """
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    blocks = decay ** np.arange(depth, 0, -1, dtype=np.float32)
    return {
        name: jax.tree.map(
            lambda x, of=name: (
                blocks.reshape(-1, *[1] * (x.ndim - 1))
                if of == "layers"
                else np.float32(decay ** (depth + 1))
            ),
            part,
        )
        for name, part in params.items()
    }
