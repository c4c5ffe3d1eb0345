"""A Q-Former that starts from BERT reads text as BERT does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

from blip2_jax.models.blip2 import AXES
from blip2_jax.models.qformer import QFormer, QFormerConfig, key_mask
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.rules import RULES
from blip2_jax.weights import bert
from blip2_jax.weights.files import WeightsError
from tests.weights import models

SIZES = QFormerConfig(
    num_query_tokens=5,
    hidden_size=128,
    num_layers=4,
    num_heads=2,
    mlp_dim=96,
    encoder_width=32,
    vocab_size=61,
    bos_token_id=60,
    max_position_embeddings=20,
    dropout=0.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=128, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=96, max_position_embeddings=20, hidden_dropout_prob=0.0,
    )  # fmt: skip
    theirs = models.randomize(transformers.BertForPreTraining(config))
    with torch.no_grad():  # dropped by BLIP-2: zeros say nothing
        theirs.bert.embeddings.token_type_embeddings.weight.zero_()
    path = tmp_path_factory.mktemp("bert")
    theirs.save_pretrained(path)
    return theirs, path


def qformer(source, sizes=SIZES):
    fresh = QFormer(sizes, rngs=nnx.Rngs(0))
    graph, state = nnx.split(fresh)
    before = nnx.to_pure_dict(state)
    return before, bert.initialize(before, sizes, str(source)), graph


@pytest.mark.parametrize("names", ["modern", "of TensorFlow's time"])
def test_text_reads_as_in_bert(folder, tmp_path, names):
    theirs, path = folder
    if names != "modern":
        tensors = load_file(path / "model.safetensors")
        old = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): t
            for n, t in tensors.items()
        }
        save_file(old, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((path / "config.json").read_text())
        path = tmp_path
    _, params, graph = qformer(path)
    ids = np.random.default_rng(0).integers(0, 60, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    want = theirs.bert(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    got, _ = nnx.merge(graph, params)(text_ids=jnp.asarray(ids), mask=key_mask(jnp.asarray(mask)))
    real = mask > 0
    np.testing.assert_allclose(np.asarray(got)[real], want.detach().numpy()[real], atol=1e-4)


def test_queries_get_copies_and_the_rest_stays(folder):
    theirs, path = folder
    before, after, _ = qformer(path)
    layers = after["groups"]["blocks"]["layers"]
    jax.tree.map(np.testing.assert_array_equal, layers["mlp_text"], layers["mlp_query"])

    def fresh(tree):
        return tree["groups"]["blocks"]["crossattention"]

    jax.tree.map(np.testing.assert_array_equal, fresh(before), fresh(after))

    def embeddings(tree):
        return tree["word_embeddings"]["embedding"]

    np.testing.assert_array_equal(embeddings(before)[60:], embeddings(after)[60:])
    known = theirs.bert.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(embeddings(after)[:60], known)


@pytest.mark.parametrize("vocab_size", [60, 61, 64])  # 61 does not divide over the devices
def test_it_is_the_same_on_a_mesh(folder, vocab_size):
    sizes = dataclasses.replace(SIZES, vocab_size=vocab_size)
    before, want, _ = qformer(folder[1], sizes)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = meshes.shardings({"qformer": before}, AXES, RULES, mesh)["qformer"]
    got = bert.initialize(jax.device_put(before, shardings), sizes, str(folder[1]))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.sharding, got) == shardings


def test_a_bert_of_other_sizes_is_refused(folder):
    with pytest.raises(WeightsError, match="has 60 tokens"):
        qformer(folder[1], dataclasses.replace(SIZES, vocab_size=50))
    with pytest.raises(WeightsError, match="the model needs"):
        qformer(folder[1], dataclasses.replace(SIZES, mlp_dim=64))
