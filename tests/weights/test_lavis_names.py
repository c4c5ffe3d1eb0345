"""LAVIS's files mean what LAVIS means by them.

Names are written down here by hand, from LAVIS's modules (`eva_vit.py`, `clip_vit.py`,
`Qformer.py`, `blip2_qformer.py`, `blip2_opt.py`), so that a mistake in our own table of names
shows: a file with these names, filled from transformers' model, computes what that model computes.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from blip2_jax.models.vit import normalize_images
from blip2_jax.weights import checkpoint
from tests.models.test_published import merge
from tests.weights import models

# transformers' names as patterns, and LAVIS's.
QFORMER = (
    (r"qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"embeddings\.(word|position)_embeddings", r"Qformer.bert.embeddings.\1_embeddings"),
    (
        r"qformer\.encoder\.layer\.(\d+)\.(attention|crossattention)\.attention\.(\w+)",
        r"Qformer.bert.encoder.layer.\1.\2.self.\3",
    ),
    (
        r"qformer\.encoder\.layer\.(\d+)\.(attention|crossattention)\.output\.(\w+)",
        r"Qformer.bert.encoder.layer.\1.\2.output.\3",
    ),
    (
        r"qformer\.encoder\.layer\.(\d+)\.((?:intermediate|output)(?:_query)?)\.(dense|LayerNorm)",
        r"Qformer.bert.encoder.layer.\1.\2.\3",
    ),
)
EVA = (
    (r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.layer_norm(1|2)",
        r"visual_encoder.blocks.\1.norm\2",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.weight",
        r"visual_encoder.blocks.\1.attn.qkv.weight",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection",
        r"visual_encoder.blocks.\1.attn.proj",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc(1|2)",
        r"visual_encoder.blocks.\1.mlp.fc\2",
    ),
    (r"vision_model\.post_layernorm", "ln_vision"),
)
STAGE1 = (("vision_projection", "vision_proj"), ("text_projection", "text_proj"))
HEADS = ("query_tokens", "itm_head.weight", "itm_head.bias")  # are called so on both sides


def lavis_state(theirs: torch.nn.Module, *names: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of transformers' model under LAVIS's names; a name without one is an error."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.startswith("language_model."):
            continue
        if qkv := re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.bias", name):
            block = f"visual_encoder.blocks.{qkv[1]}.attn"
            state[f"{block}.q_bias"], _, state[f"{block}.v_bias"] = tensor.chunk(3)
            continue
        if name in HEADS:
            state[name] = tensor
            continue
        for pattern, lavis in names:
            if re.match(pattern, name):
                state[re.sub(f"^{pattern}", lavis, name)] = tensor
                break
        else:
            pytest.fail(f"LAVIS has no name for {name}")
    return state


def load(state, file, **beside):
    """Our model of a LAVIS file."""
    torch.save({"model": state}, file)
    opened = checkpoint.open_checkpoint(str(file), **beside)
    return merge(opened.config, opened.load(opened.abstract()))


@pytest.fixture(scope="module")
def images():
    """uint8[2, 28, 28, 3], and what transformers takes."""
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3)).astype(np.uint8)
    return images, torch.tensor(np.array(normalize_images(images))).permute(0, 3, 1, 2)


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=1e-4)


def test_a_stage_1_file(images, tmp_path):
    """With the encoder, the temperature and the language head, which transformers does not have."""
    theirs = models.retrieval(num_attention_heads=16)  # as many as LAVIS's encoder has
    theirs.vision_model.post_layernorm.eps = 1e-5  # LAVIS's `ln_vision`; transformers' has 1e-6
    state = lavis_state(theirs, *EVA, *QFORMER, *STAGE1)
    draw = torch.Generator().manual_seed(0)
    head = {
        "transform.dense.weight": (128, 128),
        "transform.dense.bias": (128,),
        "transform.LayerNorm.weight": (128,),
        "transform.LayerNorm.bias": (128,),
        "bias": (61,),
    }
    head = {name: torch.randn(shape, generator=draw) for name, shape in head.items()}
    state |= {f"Qformer.cls.predictions.{name}": tensor for name, tensor in head.items()}
    state["Qformer.cls.predictions.decoder.weight"] = theirs.embeddings.word_embeddings.weight
    state["Qformer.cls.predictions.decoder.bias"] = head["bias"]
    state["temp"] = torch.tensor(0.07)
    ours = load(state, tmp_path / "stage1.pth")

    pictures, pixels = images
    ids = torch.randint(3, 60, (2, 7), generator=draw)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    inputs = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask)
    apart = theirs(**inputs, use_image_text_matching_head=False)
    matched = theirs(**inputs, use_image_text_matching_head=True)
    kv = ours.qformer.image_keys_values(ours.encode_images(pictures))
    queries, _ = ours.query_image(kv)
    close(ours.project_image(queries), apart.image_embeds)
    close(ours.embed_text(jnp.asarray(ids), jnp.asarray(mask)), apart.text_embeds)
    close(ours.match(kv, jnp.asarray(ids), jnp.asarray(mask)), matched.logits_per_image)
    assert float(ours.temp[...]) == pytest.approx(0.07)

    # The language head, on hidden states of its own.
    x = torch.randn((2, 7, 128), generator=draw)
    y = torch.nn.functional.gelu(
        torch.nn.functional.linear(x, head["transform.dense.weight"], head["transform.dense.bias"])
    )
    norm = head["transform.LayerNorm.weight"], head["transform.LayerNorm.bias"]
    y = torch.nn.functional.layer_norm(y, (128,), *norm, 1e-12)
    embeddings = theirs.embeddings.word_embeddings.weight
    close(
        ours.itg_head(jnp.asarray(x), ours.qformer.word_embeddings),
        torch.nn.functional.linear(y, embeddings, head["bias"]),
    )


def test_a_stage_2_file(images, tmp_path):
    """Without towers, as published: they come from files beside it."""
    theirs = models.generation("opt", num_attention_heads=16)
    theirs.vision_model.post_layernorm.eps = 1e-5
    state = lavis_state(theirs, *EVA, *QFORMER, ("language_projection", "opt_proj"))
    vit = {n: state.pop(n) for n in list(state) if n.startswith("visual_encoder.")}
    vit = {n.removeprefix("visual_encoder."): tensor for n, tensor in vit.items()}
    torch.save(vit, tmp_path / "eva_vit_g.pth")
    theirs.language_model.save_pretrained(tmp_path / "opt")
    ours = load(
        state, tmp_path / "stage2.pth", vit=f"{tmp_path}/eva_vit_g.pth", llm=f"{tmp_path}/opt"
    )
    pictures, pixels = images
    close(ours.visual_prompt(pictures), theirs.get_image_features(pixels).pooler_output)


def test_the_encoder_of_clip(images, tmp_path):
    """LAVIS's `clip_vit.py`, whose names are OpenAI's."""
    config = models.VISION | {"num_attention_heads": 16, "num_hidden_layers": 2}
    clip = models.randomize(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config)))
    inside = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    outside = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "pre_layrnorm.weight": "ln_pre.weight", "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight", "post_layernorm.bias": "ln_post.bias",
    }  # fmt: skip
    theirs = {n.removeprefix("vision_model."): tensor for n, tensor in clip.state_dict().items()}
    state = {lavis: theirs[name] for name, lavis in outside.items()}
    for number in range(2):
        layer, block = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            for name, lavis in inside.items():
                state[f"{block}.{lavis}.{kind}"] = theirs[f"{layer}.{name}.{kind}"]
            projections = [theirs[f"{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat(projections)
    torch.save(state, tmp_path / "clip_vit_L.pth")

    rest = lavis_state(models.retrieval(), *EVA, *QFORMER, *STAGE1)
    rest = {n: tensor for n, tensor in rest.items() if not n.startswith("visual_encoder.")}
    ours = load(rest, tmp_path / "stage1.pth", vit=f"{tmp_path}/clip_vit_L.pth")
    pictures, pixels = images
    stream = clip(pixels, output_hidden_states=True).hidden_states[-1]
    close(ours.image_features(pictures), stream)
