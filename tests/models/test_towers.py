"""OPT and CLIP's ViT compute what transformers computes, on random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip2_jax.models.opt import OPT
from blip2_jax.models.vit import ViT, normalize_images
from blip2_jax.weights import huggingface

LAYER = 1e-5


def abstract(module, dtype=jnp.float32):
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(module)))
    import jax

    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), state)


@pytest.fixture(scope="module", params=[(64, 4, 2), (160, 2, 3)], ids=["head16", "head80"])
def opts(request, tmp_path_factory):
    width, heads, layers = request.param
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=99, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        ffn_dim=2 * width, max_position_embeddings=40, word_embed_proj_dim=width, dropout=0.0,
        init_std=0.2,
    )  # fmt: skip
    theirs = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))  # norms and biases are not left at 1 and 0
    folder = tmp_path_factory.mktemp("opt")
    theirs.save_pretrained(folder)
    sizes = huggingface.llm_config(str(folder))

    def make():
        return OPT(sizes, dtype=jnp.float32, rngs=nnx.Rngs(0))

    params = huggingface.load(str(folder), sizes, abstract(make))
    graph = nnx.graphdef(nnx.eval_shape(make))
    return theirs, nnx.merge(graph, params)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_opt_logits_equal_transformers(opts, side):
    theirs, ours = opts
    ids = np.random.default_rng(0).integers(4, 99, (3, 11))
    mask = np.ones_like(ids)
    if side == "left":
        mask[1, :4] = 0
    if side == "right":
        mask[1, -4:] = 0
    with torch.no_grad():
        want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    hidden = ours(ours.embed(jnp.asarray(ids)), jnp.asarray(mask))
    real = mask > 0
    np.testing.assert_allclose(np.asarray(ours.logits(hidden))[real], want[real], atol=1e-4)


def test_clip_vit_equals_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8, initializer_range=0.2,
    )  # fmt: skip
    theirs = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))  # norms and biases are not left at 1 and 0
    theirs.save_pretrained(tmp_path)
    sizes = huggingface.vit_config(str(tmp_path))

    def make():
        return ViT(sizes, dtype=jnp.float32, rngs=nnx.Rngs(0))

    params = huggingface.load(str(tmp_path), sizes, abstract(make))
    ours = nnx.merge(nnx.graphdef(nnx.eval_shape(make)), params)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    pixels = np.array(normalize_images(jnp.asarray(images))).transpose(0, 3, 1, 2)
    with torch.no_grad():
        want = theirs(torch.tensor(pixels), output_hidden_states=True).hidden_states[-1].numpy()
    np.testing.assert_allclose(np.asarray(ours(jnp.asarray(images))), want, atol=1e-4)


def test_clips_positions_are_resampled_with_their_corners_aligned(tmp_path):
    """As in LAVIS's `clip_vit.py`; the class token keeps its own."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        image_size=32, patch_size=8, initializer_range=0.2,
    )  # fmt: skip
    theirs = transformers.CLIPVisionModel(config)
    theirs.save_pretrained(tmp_path)
    sizes = huggingface.vit_config(str(tmp_path), image_size=48)

    def make():
        return ViT(sizes, rngs=nnx.Rngs(0))

    params = huggingface.load(str(tmp_path), sizes, abstract(make))
    (table,) = (p.detach() for n, p in theirs.named_parameters() if "position_embedding" in n)
    grid = table[1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=6, mode="bicubic", align_corners=True)
    want = torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(36, 16)])
    np.testing.assert_allclose(params["pos_embed"][0], want, atol=1e-6)


def test_towers_survive_a_round_trip(tmp_path):
    """Written to a folder and read back: the same bits."""
    from blip2_jax.models.opt import OPTConfig

    sizes = OPTConfig(50, 32, 2, 4, 64, 20)
    module = OPT(sizes, rngs=nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(module))
    huggingface.save(tmp_path, sizes, params)
    assert huggingface.llm_config(str(tmp_path), dropout=sizes.dropout) == sizes
    back = huggingface.load(str(tmp_path), sizes, abstract(lambda: OPT(sizes, rngs=nnx.Rngs(0))))
    import jax

    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_what_does_not_fit_is_reported_together(tmp_path):
    from blip2_jax.models.opt import OPTConfig

    module = OPT(OPTConfig(50, 32, 2, 4, 64, 20), rngs=nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(module))
    huggingface.save(tmp_path, module.config, params)
    wide = abstract(lambda: OPT(OPTConfig(50, 48, 3, 4, 64, 20), rngs=nnx.Rngs(0)))
    with pytest.raises(huggingface.WeightsError) as error:
        huggingface.load(str(tmp_path), module.config, wide)
    assert "no tensor model.decoder.layers.2.fc1.weight" in str(error.value)
    assert "model.decoder.embed_tokens.weight is [50, 32]" in str(error.value)
