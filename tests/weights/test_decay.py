"""Weight decay of a model as a run builds it, against LAVIS's rule on LAVIS's own tensors."""

import jax
import numpy as np
import pytest

import tests.tiny as tiny
from blip2_jax import recipe
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime import optim
from blip2_jax.weights import lavis, transfer

CLIP = {
    "model.vit.pre_norm": True,
    "model.vit.attention_bias": "qkvo",
    "model.vit.patch_bias": False,
}
VISUAL = ("ln_vision", "query_tokens", "qformer")
STAGE1 = (*VISUAL, "vision_proj", "text_proj", "itm_head", "itg_head", "temp")
STAGE2 = (*VISUAL, "language_projection")


@pytest.mark.parametrize("encoder", ["eva", "clip"])
@pytest.mark.parametrize(
    ("stage", "trainable", "reads_prompt"),
    [
        ("stage1", STAGE1, False),
        ("stage1", ("vit", *STAGE1), False),
        ("stage2", STAGE2, False),
        ("stage2", ("vit", *STAGE2), False),
        ("stage2", ("vit", *STAGE2), True),
    ],
)
def test_what_is_decayed_is_what_lavis_decays(encoder, stage, trainable, reads_prompt, monkeypatch):
    """`get_optimizer_params`: all but tensors of one dimension and names that end in .bias.

    A model whose every value says whether it is decayed is written as LAVIS's file: there every
    tensor must say what the rule says of its name and shape.
    """
    masks = []
    decay_mask = optim.decay_mask

    def spy(*args, **kwargs):
        masks.append(decay_mask(*args, **kwargs))
        return masks[-1]

    monkeypatch.setattr(optim, "decay_mask", spy)
    changes = {"trainable": trainable, "model.qformer_reads_prompt": reads_prompt}
    config = tiny.config(stage, **changes, **(CLIP if encoder == "clip" else {}))
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:1])
    run = recipe.build(config, mesh)
    (mask,) = masks
    params = jax.tree.map(
        lambda x, decayed: np.full(x.shape, decayed, np.float32),
        run.abstract_state["params"],
        mask,
    )
    table = lavis.table(run.model_config, lavis.head_name(run.model_config))
    tensors = dict(transfer.tensors_of(table, params))
    assert len(tensors) > 20
    for name, tensor in tensors.items():
        want = not (tensor.ndim == 1 or name.endswith(".bias"))
        assert (np.asarray(tensor) == want).all(), name
    if "vit" in trainable:
        assert f"visual_encoder.{'cls_token' if encoder == 'eva' else 'class_embedding'}" in tensors
