"""Layers of a file become stacks: small ones on the host, large ones in place on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip2_jax.models.blip2 import AXES
from blip2_jax.models.opt import OPT
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.rules import RULES
from blip2_jax.weights import huggingface, transfer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers

    root = tmp_path_factory.mktemp("opt")
    config = transformers.OPTConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=20, word_embed_proj_dim=16,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(root)
    return str(root)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_ways_give_the_same(folder, monkeypatch, mesh, dtype):
    sizes = huggingface.llm_config(folder)
    module = nnx.eval_shape(lambda: OPT(sizes, rngs=nnx.Rngs(0)))
    abstract = nnx.to_pure_dict(nnx.state(module))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    if mesh is not None:
        made = meshes.make_mesh(mesh)
        shardings = meshes.shardings({"llm": abstract}, AXES, RULES, made)["llm"]
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract,
            shardings,
        )
    small = huggingface.load(folder, sizes, abstract)
    monkeypatch.setattr(transfer, "SMALL", 0)
    large = huggingface.load(folder, sizes, abstract)
    for one, other, want in zip(*map(jax.tree.leaves, (small, large, abstract)), strict=True):
        assert one.dtype == other.dtype == want.dtype and one.shape == want.shape
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
