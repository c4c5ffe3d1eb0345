"""The compiled functions behind `Blip2`: pure functions of parameters and arrays."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from blip2_jax.inference import decode
from blip2_jax.inference.decode_state import DecodeOutput, DecodeState, Prompt
from blip2_jax.inference.options import Decoding
from blip2_jax.models.blip2 import Blip2Base, Blip2Config, Blip2Stage1, Blip2Stage2, make_model
from blip2_jax.runtime.mesh import replicated

HEADS = {"itm_head", "vision_proj", "text_proj"}  # of stage 1; some checkpoints lack them


class Programs:
    """Compiled functions of one model; each is called as `f(params, *arrays)`.

    Args:
      config: the model's sizes.
      dtype: what is computed in.
      mesh: the devices; None: those that the arguments are on.
      given: names of the parameters' top-level parts that there are.

    Attributes:
      has_stage1_heads: whether the parameters have the heads of ITC and ITM.
    """

    def __init__(self, config: Blip2Config, dtype: Any, mesh: Mesh | None, given: Collection[str]):
        def make() -> Blip2Base:
            return make_model(config, dtype=dtype, rngs=nnx.Rngs(0))

        graph, state = nnx.split(nnx.eval_shape(make))
        abstract = nnx.to_pure_dict(state)
        missing = abstract.keys() - set(given)
        self.has_stage1_heads = not missing & HEADS

        def compiled(function: Callable[..., Any], **options: Any) -> Any:
            def call(params: dict[str, Any], *arrays: Any, **static: Any) -> Any:
                whole = params | {name: abstract[name] for name in missing}
                return function(nnx.merge(graph, whole), *arrays, **static)

            return jax.jit(call, **options)

        everywhere = None if mesh is None else replicated(mesh)
        static = {"static_argnames": ("decoding", "eos_ids", "pad_id")}
        self.embed_images = compiled(_embed_images)
        self.embed_texts = compiled(_embed_texts)
        self.embed_multimodal = compiled(_embed_multimodal)
        self.match = compiled(_match)
        self.similarity = compiled(_similarity)
        self.image_keys_values = compiled(_image_keys_values, out_shardings=everywhere)
        self.match_candidates = compiled(_match_candidates)
        self.attention_maps = compiled(_attention_maps)
        self.visual_prompt = compiled(_visual_prompt)
        self.log_likelihood = compiled(_log_likelihood)
        self.generate = compiled(_generate, **static)
        self.prefill = compiled(_prefill, **static)
        self.decode_step = compiled(_decode_step, **static)


@jax.jit
def take(examples: jax.Array, index: jax.Array) -> jax.Array:
    """Examples, [N, ...], at int32[B]."""
    return examples[index]


# --------------------------------------------------------------------------------------- stage 1


def _embed_images(model: Blip2Stage1, pixels: jax.Array) -> jax.Array:
    image_kv = model.qformer.image_keys_values(model.encode_images(pixels))
    return model.project_image(model.query_image(image_kv)[0])


def _embed_texts(model: Blip2Stage1, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model.embed_text(ids, mask)


def _embed_multimodal(
    model: Blip2Stage1, pixels: jax.Array, ids: jax.Array, mask: jax.Array
) -> jax.Array:
    image_kv = model.qformer.image_keys_values(model.encode_images(pixels))
    return model.query_image_and_text(image_kv, ids, mask).astype(jnp.float32)


def _match(model: Blip2Stage1, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    image_kv = model.qformer.image_keys_values(model.encode_images(pixels))
    return model.match(image_kv, ids, mask)


def _similarity(model: Blip2Stage1, pixels: jax.Array, features: jax.Array) -> jax.Array:
    """Cosines of B images, by their best queries, with M texts: float32[B, M]."""
    queries = _embed_images(model, pixels)
    return jnp.einsum("bqp,mp->bqm", queries, features, precision="highest").max(axis=1)


def _image_keys_values(model: Blip2Stage1, pixels: jax.Array) -> Any:
    """Cross-attention keys and values of images: two of float[groups, B, H, N, K]."""
    return model.qformer.image_keys_values(model.encode_images(pixels))


def _match_candidates(
    model: Blip2Stage1, image_kv: Any, image_index: jax.Array, ids: jax.Array, mask: jax.Array
) -> jax.Array:
    """ITM logits of pairs, float32[P, 2]; `image_index` int32[P] into `image_kv`."""
    return model.match(jax.tree.map(lambda x: x[:, image_index], image_kv), ids, mask)


# --------------------------------------------------------------------------------------- both


def _attention_maps(model: Blip2Base, pixels: jax.Array) -> jax.Array:
    return model.attention_maps(pixels)


# --------------------------------------------------------------------------------------- stage 2


def _visual_prompt(model: Blip2Stage2, pixels: jax.Array, *text: jax.Array) -> jax.Array:
    """`text`: ids and mask, where the Q-Former reads the prompt."""
    return model.visual_prompt(pixels, text or None)  # type: ignore[arg-type]


def _prompt(
    model: Blip2Stage2,
    request_index: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    visual: Sequence[jax.Array],
) -> Prompt:
    """Visual prompt, one float[B, Q, D] or none, and text, as the language model reads them."""
    embeds, whole_mask = model.llm.embed(ids), mask
    for soft in visual:
        embeds = jnp.concatenate([soft, embeds.astype(soft.dtype)], axis=1)
        whole_mask = jnp.pad(mask, ((0, 0), (soft.shape[1], 0)), constant_values=1)
    if model.language_config.is_encoder_decoder:
        start = model.language_config.decoder_start_id
        ids, mask = jnp.full_like(ids[:, :1], start), jnp.ones_like(mask[:, :1])
    return Prompt(embeds, whole_mask, ids, mask, request_index)


def _generate(
    model: Blip2Stage2,
    request_index: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    *visual: jax.Array,
    key: jax.Array,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> DecodeOutput:
    prompt = _prompt(model, request_index, ids, mask, visual)
    return decode.decode(model.llm, prompt, decoding, eos_ids=eos_ids, pad_id=pad_id, key=key)


def _prefill(
    model: Blip2Stage2,
    request_index: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    *arrays: jax.Array,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> DecodeState:
    *visual, key = arrays
    prompt = _prompt(model, request_index, ids, mask, visual)
    return decode.prefill(model.llm, prompt, decoding, eos_ids=eos_ids, pad_id=pad_id, key=key)


def _decode_step(
    model: Blip2Stage2,
    state: DecodeState,
    key: jax.Array,
    *,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> DecodeState:
    return decode.decode_step(model.llm, state, decoding, eos_ids=eos_ids, pad_id=pad_id, key=key)


def _log_likelihood(
    model: Blip2Stage2,
    ids: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
    visual: jax.Array,
) -> jax.Array:
    """Sum over the labels' tokens of their log-probability, float32[B]; arrays as in training."""
    learned = labels >= 0
    targets = jnp.where(learned, labels, 0)
    if model.language_config.is_encoder_decoder:
        real = learned.astype(mask.dtype)
        logits = model.language_logits(visual, targets, real, prefix=(ids, mask))
    else:
        logits = model.language_logits(visual, ids, mask)
    log_probs = jax.nn.log_softmax(logits)
    token_log_probs = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return jnp.where(learned, token_log_probs, 0.0).sum(axis=1)
