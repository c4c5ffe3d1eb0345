"""Greedy decoding against transformers, and the same row alone as in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip2_jax.inference.decode import greedy
from blip2_jax.models.opt import OPT
from blip2_jax.weights import huggingface

EOS, PAD = 5, 1


@pytest.fixture(scope="module", params=range(3))
def models(request, tmp_path_factory):
    torch.manual_seed(request.param)
    config = transformers.OPTConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=40, word_embed_proj_dim=32, dropout=0.0, init_std=0.3,
        eos_token_id=EOS, pad_token_id=PAD, bos_token_id=2,
    )  # fmt: skip
    theirs = transformers.OPTForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("opt")
    theirs.save_pretrained(folder)
    sizes = huggingface.llm_config(str(folder))
    make = lambda: OPT(sizes, dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))
    params = huggingface.load(str(folder), sizes, abstract)
    return theirs, nnx.merge(nnx.graphdef(nnx.eval_shape(make)), params)


def prompts():
    rng = np.random.default_rng(3)
    lengths = np.array([7, 3, 5, 1, 7, 6])
    mask = (np.arange(7) >= 7 - lengths[:, None]).astype(np.int32)
    return np.where(mask > 0, rng.integers(6, 30, mask.shape), PAD).astype(np.int32), mask


def run(llm, ids, mask, n=12):
    decode = jax.jit(
        lambda i, m: greedy(llm, llm.embed(i), m, max_new_tokens=n, eos_id=EOS, pad_id=PAD)
    )
    return np.asarray(decode(ids, mask))


def test_tokens_equal_those_of_transformers(models):
    theirs, ours = models
    ids, mask = prompts()
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=12, do_sample=False
        ).numpy()[:, 7:]
    want = np.full((len(ids), 12), PAD)
    want[:, : out.shape[1]] = np.where(out == EOS, PAD, out)
    np.testing.assert_array_equal(run(ours, ids, mask), want)


def test_a_row_alone_is_the_row_in_a_batch(models):
    _, ours = models
    ids, mask = prompts()
    together = run(ours, ids, mask)
    for row, length in enumerate(mask.sum(axis=1)):
        cut = slice(7 - length, None)  # without its padding
        alone = run(ours, ids[row : row + 1, cut], mask[row : row + 1, cut])
        np.testing.assert_array_equal(alone[0], together[row])
