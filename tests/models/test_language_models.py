"""Llama and T5 compute what transformers computes, on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip2_jax.models.blip2 import LLMS
from blip2_jax.models.layers import unstack
from blip2_jax.models.llama import Llama, LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.t5 import T5, T5Config
from blip2_jax.weights import huggingface


def load(kind, theirs, folder, **sizes):
    """Our model with transformers' weights, by way of a folder; `sizes` are changed."""
    theirs.save_pretrained(folder)
    sizes = huggingface.llm_config(str(folder), **sizes)

    def make():
        return kind(sizes, dtype=jnp.float32, rngs=nnx.Rngs(0))

    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))
    params = huggingface.load(str(folder), sizes, abstract)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), params)


def shake(model):
    """Norms are not left at one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


LLAMAS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "head dim 24": {"head_dim": 24, "num_key_value_heads": 1},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 5e5,
        }
    },
    "tied": {"tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_logits_equal_transformers(name, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "initializer_range": 0.15, "max_position_embeddings": 64,
            **LLAMAS[name],
        }
    )  # fmt: skip
    theirs = shake(transformers.LlamaForCausalLM(config))
    ours = load(Llama, theirs, tmp_path)
    ids = np.random.default_rng(0).integers(3, 61, (3, 30))
    mask = np.ones_like(ids)
    mask[1, :6] = 0
    mask[2, -6:] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        want = theirs(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    hidden = ours(ours.embed(jnp.asarray(ids)), jnp.asarray(mask))
    got = np.asarray(ours.logits(hidden))
    np.testing.assert_allclose(got[mask > 0], want[mask > 0], atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("tied", [False, True])
def test_t5_logits_equal_transformers(activation, tied, tmp_path):
    """Also past the farthest bucket (128), with padding, and step by step with a cache."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_decoder_layers=3,
        num_heads=4, feed_forward_proj="gated-gelu", dense_act_fn=activation,
        tie_word_embeddings=tied, dropout_rate=0.0, initializer_factor=1.0,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config)
    if not tied:  # transformers 5 ties at construction whatever the config says
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(61, 48) * 0.5)
    theirs = shake(theirs)
    ours = load(T5, theirs, tmp_path, activation=activation)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 61, (2, 150)), np.ones((2, 150), int)
    mask[1, 100:] = 0
    targets = rng.integers(3, 61, (2, 140))
    # Position t of `score` holds the logits of token t, given those before it.
    following = jnp.asarray(np.concatenate([targets[:, 1:], targets[:, :1]], axis=1))
    ones = jnp.ones(targets.shape, jnp.int32)
    targets[:, 0] = ours.config.decoder_start_id
    with torch.no_grad():
        want = theirs(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            decoder_input_ids=torch.tensor(targets),
        ).logits.numpy()
    got = np.asarray(ours.score(ours.embed(jnp.asarray(ids)), jnp.asarray(mask), following, ones))
    np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, np.abs(want).max()))


CONFIGS = {
    "opt": OPTConfig(40, 24, 3, 3, 32, 40),
    "llama": LlamaConfig(40, 32, 3, 4, 2, 8, 48),
    "t5": T5Config(40, 24, 2, 3, 4, 6, 32),
}


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "listed"])
@pytest.mark.parametrize("family", CONFIGS)
def test_two_sequences_decoded_token_by_token_equal_each_scored_whole(family, scan):
    """The cache, the positions, and that no sequence sees the other; for prompts of any length."""
    config = CONFIGS[family]

    def make(c):
        return LLMS[type(c)](c, rngs=nnx.Rngs(0))

    whole = make(config)
    shaken = jax.tree.map(
        lambda x: x + 0.2 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
        nnx.to_pure_dict(nnx.state(whole)),
    )
    nnx.update(whole, shaken)
    decoder = whole
    if not scan:
        graph = nnx.graphdef(make(dataclasses.replace(config, scan=False)))
        decoder = nnx.merge(graph, unstack(jax.tree.map(jnp.copy, shaken)))
    rng = np.random.default_rng(0)
    mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    mask = mask[:, ::-1] if family == "t5" else mask
    prompt = whole.embed(jnp.asarray(rng.integers(0, 40, mask.shape)))
    texts = rng.integers(0, 40, (3, 2, 7))
    want = [
        np.asarray(whole.score(prompt, jnp.asarray(mask), texts[:, b], np.ones((3, 7), int)))
        for b in range(2)
    ]
    logits, cache = decoder.prefill(prompt, jnp.asarray(mask), 14)
    ancestors = np.zeros((3, 2, 14), bool)
    for step in range(7):
        for sequence in range(2):
            got = logits if step == 0 else logits[:, sequence]
            np.testing.assert_allclose(got, want[sequence][:, step], atol=2e-5)
        logits, cache = decoder.decode_step(texts[:, :, step], cache, jnp.asarray(ancestors), step)
        ancestors[:, [0, 1], [2 * step, 2 * step + 1]] = True


def test_other_families_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(huggingface.WeightsError, match=r"'mamba'; known: opt, llama, t5"):
        huggingface.llm_config(str(tmp_path))
