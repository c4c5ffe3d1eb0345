"""Dropout in training is where transformers has it: the same arrays of the same shapes."""

import collections
import math

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from flax import nnx

import tests.weights.models as published
from blip2_jax.models import attention, layers, opt, qformer, t5
from blip2_jax.models.qformer import QFormer, QFormerConfig
from blip2_jax.weights import configs

ROWS, QUERIES, TEXT = 2, 3, 5


@pytest.fixture
def ours(monkeypatch):
    """Shapes that our dropout was asked for; one block, so a scan's body is one call."""
    seen = []

    def dropout(x, rate, key):
        if rate and key is not None:
            seen.append(x.shape)
        return x

    for module in (attention, layers, opt, qformer, t5):
        monkeypatch.setattr(module, "dropout", dropout)
    return seen


@pytest.fixture
def theirs(monkeypatch):
    seen = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if p and training:
            seen.append(tuple(x.shape))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    return seen


def sizes_of(shapes):
    """Numbers and channels; how rows and heads are grouped is a matter of layout."""
    return collections.Counter((math.prod(shape), shape[-1]) for shape in shapes)


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_a_language_model_has_transformers_dropout(llm, ours, theirs):
    rate = {"opt": {"dropout": 0.1}, "t5": {"dropout_rate": 0.1}}[llm]
    depth = {"opt": {"num_hidden_layers": 1}, "t5": {"num_layers": 1, "num_decoder_layers": 1}}
    document = published.TEXT[llm] | rate | depth[llm]
    kinds = {
        "opt": (transformers.OPTForCausalLM, transformers.OPTConfig),
        "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config),
    }
    model, config = kinds[llm]
    options = {k: v for k, v in document.items() if k != "model_type"}
    reference = model(config(**options, attn_implementation="eager")).train()
    embeds = torch.zeros(ROWS, QUERIES, reference.get_input_embeddings().embedding_dim)
    ids = torch.ones(ROWS, TEXT, dtype=torch.long)
    if llm == "t5":
        reference(inputs_embeds=embeds, labels=ids)
    else:
        whole = torch.cat([embeds, reference.get_input_embeddings()(ids)], dim=1)
        reference(inputs_embeds=whole)

    sizes = configs.parse(document, configs.LLMS, llm)
    language = (opt.OPT if llm == "opt" else t5.T5)(sizes, rngs=nnx.Rngs(0))
    mask = jnp.ones((ROWS, QUERIES), jnp.int32)
    tokens = jnp.ones((ROWS, TEXT), jnp.int32)
    language.score(
        jnp.zeros(embeds.shape), mask, tokens, jnp.ones_like(tokens), key=jax.random.key(0)
    )
    assert sizes_of(ours) == sizes_of(theirs) and ours


def test_the_qformer_has_transformers_dropout(ours, theirs):
    sizes = published.QFORMER | {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Blip2QFormerConfig(
        **sizes, use_qformer_text_input=True, attn_implementation="eager"
    )
    reference = transformers.Blip2QFormerModel(config).train()
    width, seen = config.hidden_size, config.encoder_hidden_size
    reference(
        query_embeds=torch.zeros(ROWS, QUERIES + TEXT, width),
        query_length=QUERIES,
        encoder_hidden_states=torch.zeros(ROWS, 7, seen),
    )
    own = QFormer(
        QFormerConfig(
            hidden_size=width,
            num_layers=2,
            num_heads=2,
            mlp_dim=config.intermediate_size,
            encoder_width=seen,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
        ),
        rngs=nnx.Rngs(0),
    )
    own(
        jnp.zeros((ROWS, QUERIES, width)),
        jnp.ones((ROWS, TEXT), jnp.int32),
        image_kv=own.image_keys_values(jnp.zeros((ROWS, 7, seen))),
        key=jax.random.key(0),
    )
    assert sizes_of(ours) == sizes_of(theirs) and ours
