"""BLIP-2's two compositions: image encoder + Q-Former (stage 1), and both + LLM (stage 2).

The top-level names below are the units of freezing, sharding and checkpoints: `vit`, `ln_vision`,
`query_tokens`, `qformer`, ... A run names the ones it trains; the rest is frozen. `ln_vision` is
trained in every stage, as in LAVIS, and therefore stands outside `vit`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip2_jax.models import qformer, vit
from blip2_jax.models.attention import KeysValues
from blip2_jax.models.language import LanguageModel
from blip2_jax.models.layers import Linear, layer_norm, linear, normal
from blip2_jax.models.llama import Llama, LlamaConfig
from blip2_jax.models.opt import OPT, OPTConfig
from blip2_jax.models.qformer import (
    LMHead,
    QFormer,
    QFormerConfig,
    key_mask,
    multimodal_causal_mask,
)
from blip2_jax.models.t5 import T5, T5Config
from blip2_jax.models.vit import ViT, ViTConfig

AXES = (
    *vit.AXES,
    *qformer.AXES,
    (r"^query_tokens$", (None,)),
    (r"^temp$", ()),
    (r"^(vision_proj|text_proj|itm_head|language_projection)/kernel$", ("embed", None)),
    (r"^(vision_proj|text_proj|itm_head|language_projection)/bias$", (None,)),
)

LLMConfig = OPTConfig | LlamaConfig | T5Config

LLMS: dict[type[LLMConfig], Callable[..., LanguageModel]] = {
    OPTConfig: OPT,
    LlamaConfig: Llama,
    T5Config: T5,
}


@dataclasses.dataclass(frozen=True)
class Blip2Config:
    """A BLIP-2 model. `llm=None` is the stage-1 model, with the text branch and its heads."""

    vit: ViTConfig = ViTConfig()
    qformer: QFormerConfig = QFormerConfig()
    llm: LLMConfig | None = None
    # The Q-Former of a model with an LLM reads the question too (VQA fine-tuning, InstructBLIP).
    qformer_reads_prompt: bool = False
    projection_dim: int = 256  # of the image-text contrastive features
    initial_temperature: float = 0.07  # ITC's, learned (LAVIS `blip2_qformer.py`)
    ln_vision_eps: float = 1e-5  # LAVIS; Hugging Face uses its encoder's 1e-6 here too
    freeze_vit: bool = True


class Blip2Base(nnx.Module):
    """What both stages share: frozen encoder, its norm, and queries that read the image."""

    def __init__(self, config: Blip2Config, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config = config
        width = config.qformer.hidden_size
        self.vit = ViT(config.vit, dtype=dtype, rngs=rngs)
        self.ln_vision = layer_norm(
            config.vit.hidden_size, eps=config.ln_vision_eps, dtype=dtype, rngs=rngs
        )
        self.query_tokens = nnx.Param(
            normal(config.qformer.initializer_range)(
                rngs.params(), (1, config.qformer.num_query_tokens, width)
            )
        )
        text = config.llm is None or config.qformer_reads_prompt
        self.qformer = QFormer(config.qformer, text=text, dtype=dtype, rngs=rngs)

    def image_features(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """uint8[B, H, W, 3] -> float[B, N, D_image]; no gradient enters a frozen encoder.

        `key` is randomness for the drop path of an encoder that is trained, or None.
        """
        if self.config.freeze_vit:
            return jax.lax.stop_gradient(self.vit(images))
        return self.vit(images, key)

    def encode_images(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """uint8[B, H, W, 3] -> float[B, N, D_image], normalized by `ln_vision`."""
        return self.ln_vision(self.image_features(images, key))

    def queries(self, batch: int) -> jax.Array:
        """The learned queries, once for each image: float[B, Q, D]."""
        tokens = self.query_tokens[...]
        return jnp.broadcast_to(tokens, (batch, *tokens.shape[1:]))

    def query_image(
        self, image_kv: KeysValues, key: jax.Array | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """Lets the queries read images, whose keys and values `qformer.image_keys_values` made.

        Returns:
          float[B, Q, D], and the self-attention keys and values that ITG continues from.
        """
        return self.qformer(self.queries(image_kv[0].shape[1]), image_kv=image_kv, key=key)

    def query_image_and_text(
        self, image_kv: KeysValues, ids: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """The same where queries and text see each other: float[B, Q, D], of the queries."""
        num_queries = self.config.qformer.num_query_tokens
        hidden, _ = self.qformer(
            self.queries(len(ids)),
            ids,
            image_kv=image_kv,
            mask=key_mask(mask, num_queries),
            key=key,
        )
        return hidden[:, :num_queries]

    def attention_maps(self, images: jax.Array) -> jax.Array:
        """Each query's attention to the image, in the last cross-attention, averaged over heads.

        Args:
          images: uint8[B, H, W, 3].

        Returns:
          float32[B, Q, G, G] over the patches; the class token's share is left out.
        """
        image_kv = self.qformer.image_keys_values(self.encode_images(images))
        maps = self.qformer.attention_maps(self.queries(len(images)), image_kv)
        grid = self.config.vit.grid
        return maps[-1].mean(axis=1)[..., 1:].reshape(*maps.shape[1:2], -1, grid, grid)


class Blip2Stage1(Blip2Base):
    """Representation learning: the Q-Former with its text branch and the heads of ITC, ITM, ITG."""

    def __init__(self, config: Blip2Config, *, dtype: Any = None, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        width = config.qformer.hidden_size
        self.vision_proj = _head(width, config.projection_dim, dtype, rngs)
        self.text_proj = _head(width, config.projection_dim, dtype, rngs)
        self.itm_head = _head(width, 2, dtype, rngs)
        self.itg_head = LMHead(config.qformer, dtype=dtype, rngs=rngs)
        self.temp = nnx.Param(jnp.array(config.initial_temperature, jnp.float32))

    def project_image(self, query_output: jax.Array) -> jax.Array:
        """float[B, Q, D] -> float32[B, Q, P], of unit length."""
        return _unit(self.vision_proj(query_output))

    def embed_text(
        self, ids: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Text alone, read out at [CLS]: int32[B, T] twice -> float32[B, P], of unit length."""
        hidden, _ = self.qformer(text_ids=ids, mask=key_mask(mask), key=key)
        return _unit(self.text_proj(hidden[:, 0]))

    def match(
        self, image_kv: KeysValues, ids: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """ITM: queries and text see each other; float32[B, 2], index 1 means that they match."""
        hidden = self.query_image_and_text(image_kv, ids, mask, key)
        return self.itm_head(hidden).astype(jnp.float32).mean(axis=1)

    def generate_logits(
        self, past: KeysValues, ids: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """ITG: text continues the queries' keys and values, `past`; float32[B, T, V]."""
        num_queries = self.config.qformer.num_query_tokens
        hidden, _ = self.qformer(
            text_ids=ids, mask=multimodal_causal_mask(mask, num_queries), past=past, key=key
        )
        return self.itg_head(hidden, self.qformer.word_embeddings)


class Blip2Stage2(Blip2Base):
    """Generative learning: the queries' outputs, projected, stand before the LLM's text."""

    def __init__(self, config: Blip2Config, *, dtype: Any = None, rngs: nnx.Rngs):
        if config.llm is None:
            raise ValueError("A stage-2 model has a language model; Blip2Config.llm is None.")
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.language_config = config.llm
        self.language_projection = _head(
            config.qformer.hidden_size, config.llm.hidden_size, dtype, rngs
        )
        self.llm: LanguageModel = LLMS[type(config.llm)](config.llm, dtype=dtype, rngs=rngs)

    def visual_prompt(
        self,
        images: jax.Array,
        text: tuple[jax.Array, jax.Array] | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The image, as the LLM reads it: soft prompts.

        Args:
          images: uint8[B, H, W, 3].
          text: ids and mask, int32[B, T], of what the queries read together with the image; given
            if and only if the model's `qformer_reads_prompt`.
          key: randomness for dropout, or None.

        Returns:
          float[B, Q, D_llm].
        """
        if (text is not None) != self.config.qformer_reads_prompt:
            raise ValueError(
                "This model's Q-Former reads the prompt's text too; give it."
                if text is None
                else "This model's Q-Former reads no text; leave it out."
            )
        # An extra key, not a split: without drop path the Q-Former's dropout stays what it was.
        k_vit = None if key is None else jax.random.fold_in(key, 1)
        image_kv = self.qformer.image_keys_values(self.encode_images(images, k_vit))
        if text is None:
            output, _ = self.query_image(image_kv, key)
        else:
            output = self.query_image_and_text(image_kv, *text, key)
        return self.language_projection(output)

    def language_logits(
        self,
        prompt: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        key: jax.Array | None = None,
        *,
        prefix: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Logits of the text that follows a visual prompt.

        Args:
          prompt: float[B, Q, D_llm].
          ids, mask: int32[B, T], the text. An encoder-decoder's decoder reads it.
          key: randomness for the LLM's dropout, or None.
          prefix: ids and mask, int32[B, P], of text between the two that is not scored (T5's
            prefix: its encoder reads it after the visual prompt).

        Returns:
          float32[B, T, V]: position t holds the logits of token t, given the prompt and the
          tokens before it.
        """
        prompt_mask = jnp.ones(prompt.shape[:2], mask.dtype)
        if prefix is not None:
            embeds = self.llm.embed(prefix[0]).astype(prompt.dtype)
            prompt = jnp.concatenate([prompt, embeds], axis=1)
            prompt_mask = jnp.concatenate([prompt_mask, prefix[1]], axis=1)
        return self.llm.score(prompt, prompt_mask, ids, mask, key=key)


def _head(d_in: int, d_out: int, dtype: Any, rngs: nnx.Rngs) -> Linear:
    """A linear layer as wide as LAVIS starts its heads: torch's default, of variance 1 / (3 d)."""
    return linear(d_in, d_out, std=(3 * d_in) ** -0.5, dtype=dtype, rngs=rngs)


def _unit(x: jax.Array) -> jax.Array:
    """Scales the last axis to unit length, in float32 (torch's `normalize`, eps 1e-12)."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def make_model(config: Blip2Config, *, dtype: Any = None, rngs: nnx.Rngs) -> Blip2Base:
    """The stage-1 or stage-2 model of a config."""
    kind = Blip2Stage1 if config.llm is None else Blip2Stage2
    return kind(config, dtype=dtype, rngs=rngs)
