"""FLOPs of a train step, counted by hand from the sizes of the towers.

Matrix products only, two FLOPs a multiplication, as is usual for MFU; what a remat policy computes
again is not counted, because it is no progress. Backward costs follow from what is trained:

    frozen encoder     forward alone: nothing behind it is differentiated
    trained part       twice its forward: gradients of its inputs and of its weights
    frozen LLM         once its forward, for the inputs alone; its attention scores, which are
                       products of two activations, twice

A stage's `flops_per_sample` puts together what its step computes. XLA counts the same within 3%
(tests/stages/test_flops.py).
"""

from typing import Any, NamedTuple

from blip2_jax import stages
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


def flops_per_sample(config: Any, sizes: Any) -> dict[str, Flops]:
    """FLOPs of one sample in one train step.

    Args:
      config: a recipe's config: the stage, what is trained, text lengths, the batch size (a row
        of ITC's similarities is as long as the batch).
      sizes: `recipe.Recipe.model_config`.

    Returns:
      Tower or part -> its FLOPs. `sum(f.total for f in ....values())` is the step's, per sample.
    """
    return stages.load(config.stage.name).flops_per_sample(config, sizes)


def linear(tokens: float, *widths: int) -> Work:
    """A chain of linear layers on so many tokens."""
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return Work(weights=sum(2.0 * tokens * d_in * d_out for d_in, d_out in pairs))


def scores(queries: int, keys: int, width: int) -> Work:
    """q.k and p.v of all heads, whose widths sum to `width`; what a mask hides is computed too."""
    return Work(scores=4.0 * queries * keys * width)


def vit(c: ViTConfig) -> Work:
    """The image encoder on one image."""
    tokens, width = c.num_tokens, c.hidden_size
    patches = Work(first=2.0 * c.grid**2 * 3 * c.patch_size**2 * width)
    attention = linear(4 * tokens, width, width) + scores(tokens, tokens, width)
    return patches + (attention + linear(tokens, width, c.mlp_dim, width)) * c.num_layers


def image_keys_values(c: QFormerConfig, encoder: ViTConfig) -> Work:
    """Keys and values of one image, for all layers with cross-attention."""
    layers = c.num_layers // c.cross_attention_frequency
    return linear(2 * encoder.num_tokens, encoder.hidden_size, c.hidden_size) * layers


def qformer(c: QFormerConfig, queries: int, text: int, image_tokens: int, past: int = 0) -> Work:
    """One pass over one sample; the image's keys and values are counted apart."""
    tokens, width = queries + text, c.hidden_size
    attention = linear(4 * tokens, width, width) + scores(tokens, past + tokens, width)
    layer = attention + linear(tokens, width, c.mlp_dim, width)
    cross = linear(2 * queries, width, width) + scores(queries, image_tokens, width)
    return layer * c.num_layers + cross * (c.num_layers // c.cross_attention_frequency)


def decoder(c: OPTConfig | LlamaConfig, tokens: int, scored: int) -> Work:
    """A decoder-only LLM on a row of tokens, of which so many are scored."""
    width = c.hidden_size
    if c.family == "llama":
        heads, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        feed_forward = linear(3 * tokens, width, c.mlp_dim)  # gate, up and down
    else:
        heads = keys = width
        feed_forward = linear(2 * tokens, width, c.ffn_dim)
    attention = linear(2 * tokens, width, heads) + linear(2 * tokens, width, keys)
    attention += scores(tokens, tokens, heads)
    return (attention + feed_forward) * c.num_layers + linear(scored, width, c.vocab_size)


def encoder_decoder(c: T5Config, read: int, generated: int) -> Work:
    """T5: the encoder reads the visual prompt and text, the decoder generates text."""
    width, heads = c.hidden_size, c.num_heads * c.head_dim

    def layer(tokens: int) -> Work:
        attention = linear(4 * tokens, width, heads) + scores(tokens, tokens, heads)
        return attention + linear(3 * tokens, width, c.mlp_dim)

    cross = linear(2 * (generated + read), width, heads) + scores(generated, read, heads)
    encoder = layer(read) * c.num_layers
    decoder = (layer(generated) + cross) * c.num_decoder_layers
    return encoder + decoder + linear(generated, width, c.vocab_size)
