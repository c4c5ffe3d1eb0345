"""FLOPs of a train step, counted by hand from the sizes of the towers.

Matrix products only, two FLOPs a multiplication, as is usual for MFU; what a remat policy computes
again is not counted, because it is no progress. Backward costs follow from what is trained:

    frozen encoder     forward alone: nothing behind it is differentiated
    trained part       twice its forward: gradients of its inputs and of its weights
    frozen LLM         once its forward, for the inputs alone; its attention scores, which are
                       products of two activations, twice

XLA counts the same within 3% (tests/stages/test_flops.py).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from blip2_jax.data.examples import llm_lengths
from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.models.vit import ViTConfig


class Flops(NamedTuple):
    """Of one sample in one step."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


class Work(NamedTuple):
    """Forward FLOPs, by what their gradient costs.

    Attributes:
      weights: products of an activation with weights.
      scores: products of two activations (attention scores and their use).
      first: products with weights whose input needs no gradient (patches of an image).
    """

    weights: float = 0.0
    scores: float = 0.0
    first: float = 0.0

    # Works add up and are multiplied, which is not what a tuple's own + and * mean.
    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "Work":  # type: ignore[override]
        return Work(*(times * part for part in self))

    def flops(self, *, trained: bool, inputs: bool = True) -> Flops:
        """Forward and backward.

        Args:
          trained: whether the weights are.
          inputs: whether anything before it is (otherwise no gradient goes through).
        """
        backward = 0.0
        if trained or inputs:
            backward = self.weights * (1 + trained) + 2 * self.scores + self.first * trained
        return Flops(sum(self), backward)


def _linear(tokens: float, *widths: int) -> Work:
    """A chain of linear layers on so many tokens."""
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return Work(weights=sum(2.0 * tokens * d_in * d_out for d_in, d_out in pairs))


def _scores(queries: int, keys: int, width: int) -> Work:
    """q.k and p.v of all heads, whose widths sum to `width`; what a mask hides is computed too."""
    return Work(scores=4.0 * queries * keys * width)


def flops_per_sample(config: Any, model_config: Any) -> dict[str, Flops]:
    """FLOPs of one sample in one train step.

    Args:
      config: a recipe's config: the stage, what is trained, text lengths, the batch size (a row
        of ITC's similarities is as long as the batch).
      model_config: the sizes, `recipe.Recipe.model_config`.

    Returns:
      Tower or part -> its FLOPs. `sum(f.total for f in ....values())` is the step's, per sample.

    Raises:
      ValueError: a stage that is not known here.
    """
    stage = config.stage.name
    if stage == "stage1":
        return _stage1(config, model_config)
    if stage == "stage2":
        return _stage2(config, model_config)
    if stage == "pretrain_vit":
        heads = sum(config.stage.labels.values())
        patches = model_config.grid**2
        return {
            "vit": _vit(model_config).flops(trained=True),
            "heads": _linear(patches, model_config.hidden_size, heads).flops(trained=True),
        }
    if stage == "pretrain_lm":
        length = config.data.llm_length
        return {"llm": _decoder(model_config, length, length - 1).flops(trained=True)}
    raise ValueError(f"No count of FLOPs for the stage {stage!r}.")


def _stage1(config: Any, sizes: Blip2Config) -> dict[str, Flops]:
    """Passes of the Q-Former: queries (ITC), text (ITC), three pairs (ITM), text (ITG).

    Keys and values are made of two images a sample, its own and its hard negative, whose features
    another device may have sent.
    """
    c, text, trained = sizes.qformer, config.data.text_length, _trained(config)
    queries, width = c.num_query_tokens, c.hidden_size
    qformer = _image_keys_values(c, sizes.vit)
    qformer += _qformer(c, queries, 0, sizes.vit.num_tokens) + _qformer(c, 0, text, 0)
    if "itm" in config.stage.objectives:
        qformer += _image_keys_values(c, sizes.vit)
        qformer += _qformer(c, queries, text, sizes.vit.num_tokens) * 3
    if "itg" in config.stage.objectives:
        qformer += _qformer(c, 0, text, 0, past=queries)
    similarity = Work(scores=2.0 * config.data.batch_size * queries * sizes.projection_dim)
    projections = _linear(queries + 1, width, sizes.projection_dim)
    heads = {
        "itc": (projections + similarity).flops(trained=True),
        "itm": _linear(3 * queries, width, 2).flops(trained="itm_head" in trained),
        "itg": _linear(text, width, width, c.vocab_size).flops(trained="itg_head" in trained),
    }
    return {
        "vit": _encoder(sizes, trained),
        "qformer": qformer.flops(trained="qformer" in trained),
        **{name: head for name, head in heads.items() if name in config.stage.objectives},
    }


def _stage2(config: Any, sizes: Blip2Config) -> dict[str, Flops]:
    """One pass of the Q-Former, and the LLM on its output and the text."""
    c, trained = sizes.qformer, _trained(config)
    read, learned = llm_lengths(config, encoder_decoder=isinstance(sizes.llm, T5Config))
    queries = c.num_query_tokens
    text = config.data.text_length if sizes.qformer_reads_prompt else 0
    qformer = _qformer(c, queries, text, sizes.vit.num_tokens) + _image_keys_values(c, sizes.vit)
    if sizes.llm is None:
        raise ValueError("A stage-2 model has a language model; Blip2Config.llm is None.")
    projection = _linear(queries, c.hidden_size, sizes.llm.hidden_size)
    if isinstance(sizes.llm, T5Config):
        llm = _encoder_decoder(sizes.llm, queries + read, learned)
    else:
        llm = _decoder(sizes.llm, queries + read, learned)
    return {
        "vit": _encoder(sizes, trained),
        "qformer": qformer.flops(trained="qformer" in trained),
        "language_projection": projection.flops(trained="language_projection" in trained),
        "llm": llm.flops(trained="llm" in trained),
    }


def _trained(config: Any) -> Iterable[str]:
    return frozenset(config.trainable)


def _encoder(sizes: Blip2Config, trained: Iterable[str]) -> Flops:
    return _vit(sizes.vit).flops(trained="vit" in trained, inputs=False)


def _vit(c: ViTConfig) -> Work:
    tokens, width = c.num_tokens, c.hidden_size
    patches = Work(first=2.0 * c.grid**2 * 3 * c.patch_size**2 * width)
    attention = _linear(4 * tokens, width, width) + _scores(tokens, tokens, width)
    return patches + (attention + _linear(tokens, width, c.mlp_dim, width)) * c.num_layers


def _image_keys_values(c: QFormerConfig, encoder: ViTConfig) -> Work:
    """Of one image, for all layers that look at it."""
    layers = c.num_layers // c.cross_attention_frequency
    return _linear(2 * encoder.num_tokens, encoder.hidden_size, c.hidden_size) * layers


def _qformer(c: QFormerConfig, queries: int, text: int, image_tokens: int, past: int = 0) -> Work:
    """One pass over one sample; the image's keys and values are counted apart."""
    tokens, width = queries + text, c.hidden_size
    attention = _linear(4 * tokens, width, width) + _scores(tokens, past + tokens, width)
    layer = attention + _linear(tokens, width, c.mlp_dim, width)
    look = _linear(2 * queries, width, width) + _scores(queries, image_tokens, width)
    return layer * c.num_layers + look * (c.num_layers // c.cross_attention_frequency)


def _decoder(c: OPTConfig | LlamaConfig, tokens: int, scored: int) -> Work:
    """A decoder-only LLM on a row of tokens, of which so many are scored."""
    width = c.hidden_size
    if isinstance(c, LlamaConfig):
        heads, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        feed_forward = _linear(3 * tokens, width, c.mlp_dim)  # gate, up and down
    else:
        heads = keys = width
        feed_forward = _linear(2 * tokens, width, c.ffn_dim)
    attention = _linear(2 * tokens, width, heads) + _linear(2 * tokens, width, keys)
    attention += _scores(tokens, tokens, heads)
    return (attention + feed_forward) * c.num_layers + _linear(scored, width, c.vocab_size)


def _encoder_decoder(c: T5Config, read: int, written: int) -> Work:
    """T5: the encoder reads the visual prompt and text, the decoder writes text."""
    width, heads = c.hidden_size, c.num_heads * c.head_dim
    own = lambda t: _linear(4 * t, width, heads) + _scores(t, t, heads)  # noqa: E731
    feed_forward = lambda t: _linear(3 * t, width, c.mlp_dim)  # noqa: E731
    cross = _linear(2 * (written + read), width, heads) + _scores(written, read, heads)
    encoder = (own(read) + feed_forward(read)) * c.num_layers
    decoder = (own(written) + cross + feed_forward(written)) * c.num_decoder_layers
    return encoder + decoder + _linear(written, width, c.vocab_size)
