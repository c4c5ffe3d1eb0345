"""Whole models compute what transformers computes on the same random weights, gradients included.

float32; 1e-5 a layer, 1e-4 from pixels to logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import save_file

from blip2_jax.models.blip2 import Blip2Config, make_model
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.vit import ViTConfig, normalize_images
from blip2_jax.weights import checkpoint, files, huggingface, transfer
from blip2_jax.weights.positions import resize
from tests.weights import models

LAYER, WHOLE = 1e-5, 1e-4
IMAGE_TOKEN = 69


def load(theirs, folder, **vit):
    """Our model with the weights of transformers' one; `vit` changes sizes of the encoder."""
    import dataclasses

    theirs.save_pretrained(folder)
    config = huggingface.blip2_config(str(folder))
    config = dataclasses.replace(config, vit=dataclasses.replace(config.vit, **vit))
    parts = tuple(huggingface.blip2_parts(str(folder), config))
    opened = checkpoint.Checkpoint(str(folder), config, parts, folder)
    return merge(config, opened.load(opened.abstract()))


def merge(config, params):
    def make():
        return make_model(config, dtype=jnp.float32, rngs=nnx.Rngs(0))

    module = nnx.eval_shape(make)
    whole = nnx.to_pure_dict(nnx.state(module))
    fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), whole)
    return nnx.merge(nnx.graphdef(module), {**fresh, **params})


def pictures(size=28, n=2):
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    pixels = np.array(normalize_images(jnp.asarray(images))).transpose(0, 3, 1, 2)
    return jnp.asarray(images), torch.tensor(pixels)


def texts(vocab, side, n=2, length=9):
    ids = np.random.default_rng(1).integers(3, vocab, (n, length))
    mask = np.ones_like(ids)
    if side == "left":
        mask[1, :4] = 0
    if side == "right":
        mask[1, -4:] = 0
    return ids, mask


def close(ours, theirs, atol=WHOLE):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=atol)


@pytest.fixture(scope="module")
def generation(tmp_path_factory):
    built = {}

    def get(llm):
        if llm not in built:
            theirs = models.generation(llm)
            built[llm] = (theirs, load(theirs, tmp_path_factory.mktemp(llm)))
        return built[llm]

    return get


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory):
    theirs = models.retrieval()
    return theirs, load(theirs, tmp_path_factory.mktemp("retrieval"))


def test_every_block_of_the_image_encoder(generation):
    theirs, ours = generation("opt")
    images, pixels = pictures()
    out = theirs.vision_model(pixels, output_hidden_states=True)
    graph, params = nnx.split(ours.vit.layers.blocks)
    for i in range(ours.config.vit.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda p: p[i], params))  # noqa: B023
        got = block(jnp.asarray(out.hidden_states[i].detach().numpy()))
        close(got, out.hidden_states[i + 1], LAYER)
    close(ours.vit(images), out.hidden_states[-1])
    close(ours.encode_images(images), out.last_hidden_state)
    # Too small to be seen in float32.
    assert ours.ln_vision.epsilon == theirs.vision_model.post_layernorm.eps
    assert block.norm1.epsilon == theirs.vision_model.encoder.layers[0].layer_norm1.eps


def test_every_layer_of_the_qformer(retrieval):
    """Queries and text together, with padding; layer by layer through transformers' own states."""
    theirs, ours = retrieval
    image = 0.5 * torch.randn(2, 17, 176, generator=torch.Generator().manual_seed(3))
    ids, mask = texts(61, "right")
    queries = theirs.query_tokens.expand(2, -1, -1)
    seen = torch.cat([torch.ones(2, 5, dtype=torch.long), torch.tensor(mask)], dim=1)
    embeds = theirs.embeddings(input_ids=torch.tensor(ids), query_embeds=queries)
    out = theirs.qformer(
        query_embeds=embeds,
        query_length=5,
        attention_mask=seen,
        encoder_hidden_states=image,
        output_hidden_states=True,
    )
    image_kv = ours.qformer.image_keys_values(jnp.asarray(image.numpy()))
    got, _ = ours.qformer(
        ours.queries(2),
        jnp.asarray(ids),
        image_kv=image_kv,
        mask=jnp.asarray(seen)[:, None, None] > 0,
    )
    real = np.asarray(seen) > 0
    np.testing.assert_allclose(
        np.asarray(got)[real], out.last_hidden_state.detach().numpy()[real], atol=WHOLE
    )
    graph, params = nnx.split(ours.qformer.groups.blocks)
    for g in range(2):
        group = nnx.merge(graph, jax.tree.map(lambda p: p[g], params))  # noqa: B023
        x = jnp.asarray(out.hidden_states[2 * g].detach().numpy())
        kv = jax.tree.map(lambda p: p[g], image_kv)  # noqa: B023
        y, _ = group(x, 5, kv, jnp.asarray(seen)[:, None, None] > 0, None, None, False)
        want = out.hidden_states[2 * g + 2].detach().numpy()
        np.testing.assert_allclose(np.asarray(y)[real], want[real], atol=LAYER)


def test_attention_maps_are_where_transformers_looks(retrieval, monkeypatch):
    """In the last layer that looks: the third of four; the class token's share is left out."""
    theirs, ours = retrieval
    monkeypatch.setattr(theirs.qformer.config, "_attn_implementation", "eager")  # it can say where
    images, pixels = pictures()
    out = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(2, -1, -1),
        query_length=5,
        encoder_hidden_states=theirs.vision_model(pixels).last_hidden_state,
        output_attentions=True,
    )
    looks = out.cross_attentions[-1].mean(dim=1).detach()  # over heads: [2, 5, 17]
    assert float((looks[..., 1:] - 1 / 17).abs().max()) > 0.01  # they look somewhere
    close(ours.attention_maps(images), looks[..., 1:].reshape(2, 5, 4, 4), LAYER)


def test_contrast_and_match_equal_the_retrieval_model(retrieval):
    theirs, ours = retrieval
    images, pixels = pictures()
    ids, mask = texts(61, "right")
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    out = theirs(pixel_values=pixels, **inputs, use_image_text_matching_head=False)
    image_kv = ours.qformer.image_keys_values(ours.encode_images(images))
    queries = ours.project_image(ours.query_image(image_kv)[0])
    text = ours.embed_text(jnp.asarray(ids), jnp.asarray(mask))
    close(queries, out.image_embeds)
    close(text, out.text_embeds)
    close(jnp.einsum("nqp,mp->nmq", queries, text).max(-1), out.logits_per_image)
    out = theirs(pixel_values=pixels, **inputs, use_image_text_matching_head=True)
    close(ours.match(image_kv, jnp.asarray(ids), jnp.asarray(mask)), out.logits_per_image)


def test_a_fresh_model_is_as_wide_as_lavis_starts_it():
    """Heads as torch's linear layers, the Q-Former and ITG's head as BERT (`blip2_qformer.py`)."""
    torch.manual_seed(0)
    sizes = QFormerConfig(
        num_query_tokens=16, hidden_size=96, num_layers=2, num_heads=2, mlp_dim=96,
        encoder_width=64, vocab_size=61, bos_token_id=60, max_position_embeddings=20,
    )  # fmt: skip
    vit = ViTConfig(image_size=28, hidden_size=64, num_layers=1, num_heads=1, mlp_dim=64)
    opt = OPTConfig(70, 160, 1, 2, 32, 60)
    heads = {"vision_proj": 256, "text_proj": 256, "itm_head": 2, "language_projection": 160}
    widths = {name: torch.nn.Linear(96, n).weight.detach().std() for name, n in heads.items()}
    widths |= dict.fromkeys(("query_tokens", "qformer", "itg_head"), 0.02)
    for llm in (None, opt):
        config = Blip2Config(vit=vit, qformer=sizes, llm=llm)
        model = nnx.to_pure_dict(nnx.state(make_model(config, rngs=nnx.Rngs(0))))
        for path, leaf in transfer.leaves_of(model).items():
            std = float(widths.get(path.split("/")[0], 0))
            if not std or "norm" in path or path.endswith("bias"):
                continue
            # Five standard errors.
            assert abs(float(leaf.std()) / std - 1) < 5 * leaf.size**-0.5, path
        assert "temp" not in model or model["temp"] == np.float32(0.07)


@pytest.mark.parametrize("llm", ["opt", "llama", "t5"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_logits_from_pixels(generation, llm, side):
    """All three families, padding on either side; T5's encoder reads the text as a prefix."""
    theirs, ours = generation(llm)
    images, pixels = pictures()
    ids, mask = texts(60, side)
    head = torch.full((2, 5), IMAGE_TOKEN)
    inputs = {
        "pixel_values": pixels,
        "input_ids": torch.cat([head, torch.tensor(ids)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(head), torch.tensor(mask)], dim=1),
    }
    prompt = ours.visual_prompt(images)
    if llm == "t5":
        target = np.random.default_rng(2).integers(3, 60, (2, 6))
        want = theirs(**inputs, labels=torch.tensor(target)).logits.detach().numpy()
        got = ours.language_logits(
            prompt,
            jnp.asarray(target),
            jnp.ones(target.shape, jnp.int32),
            prefix=(jnp.asarray(ids), jnp.asarray(mask)),
        )
        np.testing.assert_allclose(np.asarray(got), want, atol=WHOLE)
        return
    # Their position t scores token t + 1, ours token t; the first text token is scored at the
    # last query.
    want = theirs(**inputs).logits.detach().numpy()[:, 4:-1].copy()
    if side == "left" and llm == "llama":
        # Their forward counts padding as positions (their `generate` does not): row 1 without it.
        cut = {
            name: torch.cat([inputs[name][1:, :5], inputs[name][1:, 9:]], dim=1)
            for name in ("input_ids", "attention_mask")
        }
        row = theirs(pixel_values=pixels[1:], **cut).logits.detach().numpy()
        want[1, 4:] = row[0, 4:-1]
    got = np.asarray(ours.language_logits(prompt, jnp.asarray(ids), jnp.asarray(mask)))
    # What a padding position says means nothing; nor, with padding on the left, the last query.
    real = (mask > 0) & (np.pad(mask, ((0, 0), (1, 0)), constant_values=1)[:, :-1] > 0)
    np.testing.assert_allclose(got[real], want[real], atol=WHOLE)
    assert real.sum() > 10


def test_instructblip_reads_the_question_into_the_qformer(tmp_path):
    theirs = models.instruct("llama")
    ours = load(theirs, tmp_path)
    images, pixels = pictures()
    ids, mask = texts(60, "none")
    question, question_mask = texts(61, "right", length=7)
    head = torch.full((2, 5), IMAGE_TOKEN)
    want = theirs(
        pixel_values=pixels,
        qformer_input_ids=torch.tensor(question),
        qformer_attention_mask=torch.tensor(question_mask),
        input_ids=torch.cat([head, torch.tensor(ids)], dim=1),
        attention_mask=torch.ones(2, 14, dtype=torch.long),
    ).logits[:, 4:-1]
    text = (jnp.asarray(question), jnp.asarray(question_mask))
    prompt = ours.visual_prompt(images, text)
    close(ours.language_logits(prompt, jnp.asarray(ids), jnp.asarray(mask)), want)
    with pytest.raises(ValueError, match="reads the prompt's text too"):
        ours.visual_prompt(images)


@pytest.mark.parametrize("llm", ["opt", "llama", "t5"])
def test_gradients_of_all_that_is_trained(generation, llm, tmp_path):
    """Of the language-modeling loss, through the frozen LLM, to Q-Former, queries and norms."""
    theirs, ours = generation(llm)
    images, pixels = pictures()
    ids, mask = texts(60, "none")
    head = torch.full((2, 5), IMAGE_TOKEN)
    if llm == "t5":
        inputs, labels = head, torch.tensor(ids)
        seen = torch.ones_like(head)
    else:
        inputs = torch.cat([head, torch.tensor(ids)], dim=1)
        labels = torch.cat([torch.full_like(head, -100), torch.tensor(ids)], dim=1)
        seen = torch.ones_like(inputs)
    theirs.zero_grad()
    want_loss = theirs(
        pixel_values=pixels, input_ids=inputs, attention_mask=seen, labels=labels
    ).loss
    want_loss.backward()

    graph, params = nnx.split(ours)
    params = nnx.to_pure_dict(params)

    def loss(params):
        model = nnx.merge(graph, params)
        logits = model.language_logits(
            model.visual_prompt(images), jnp.asarray(ids), jnp.asarray(mask)
        )
        scores = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(scores, jnp.asarray(ids)[..., None], axis=-1).mean()

    got_loss, got = jax.value_and_grad(loss)(params)
    assert abs(float(got_loss) - want_loss.item()) < LAYER

    # The gradients travel through the name table as the weights do.
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    save_file({n: g.contiguous() for n, g in grads.items()}, tmp_path / "model.safetensors")
    kept = ("ln_vision", "query_tokens", "qformer", "language_projection")
    table = huggingface.blip2_table(ours.config)
    rows = tuple(r for r in table.rows if r.ours[0] and r.ours[0].split("/")[0] in kept)
    table = type(table)(rows, {}, (r"(vision|language)_model\..*",))
    abstract = {
        k: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), got[k]) for k in kept
    }
    want = transfer.load(table, abstract, files.open_folder(tmp_path))
    for path, leaf in transfer.leaves_of(want).items():
        ours_leaf = transfer.leaves_of(got)[path]
        scale = max(float(jnp.abs(leaf).max()), 1.0)
        np.testing.assert_allclose(
            np.asarray(ours_leaf), np.asarray(leaf), atol=LAYER * scale, err_msg=path
        )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 1e-3
    vit = jax.tree.leaves(got["vit"])
    assert not any(np.asarray(x).any() for x in vit)  # no gradient enters the frozen encoder


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sides", [(16, 26), (16, 35), (4, 6), (6, 4), (5, 5)])
def test_positions_are_resampled_as_torch_does(align_corners, sides):
    old, new = sides
    table = np.random.default_rng(0).normal(size=(1, 1 + old**2, 8)).astype(np.float32)
    grid = torch.tensor(table[:, 1:]).reshape(1, old, old, 8).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(
        grid, size=(new, new), mode="bicubic", align_corners=align_corners
    )
    want = want.permute(0, 2, 3, 1).reshape(1, -1, 8).numpy()
    got = resize(table, 1 + new**2, align_corners=align_corners)
    np.testing.assert_array_equal(got[:, :1], table[:, :1])
    np.testing.assert_allclose(got[:, 1:], want, atol=LAYER)


def test_a_larger_image_reads_resampled_positions(tmp_path):
    """364 pixels with a checkpoint of 224, scaled down: 42 with one of 28."""
    theirs = models.generation("opt")
    ours = load(theirs, tmp_path, image_size=42)
    images, pixels = pictures(42)
    out = theirs.vision_model(pixels, interpolate_pos_encoding=True)
    close(ours.encode_images(images), out.last_hidden_state)


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_bfloat16_stays_near(generation, family, tmp_path):
    """What bfloat16 costs, measured: the share of positions where both choose the same token."""
    theirs, ours = generation(family)
    images, _ = pictures(n=8)
    ids, mask = texts(60, "none", n=8)
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    want = np.asarray(ours.language_logits(ours.visual_prompt(images), ids, mask))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.to_pure_dict(nnx.state(ours)))

    def make():
        return make_model(ours.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    half = nnx.merge(nnx.graphdef(nnx.eval_shape(make)), params)
    got = half.language_logits(half.visual_prompt(images), ids, mask)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
    assert error < 0.05, error
    del theirs


def test_transformers_is_not_a_version_known_to_be_wrong():
    assert not transformers.__version__.startswith("4.52")
