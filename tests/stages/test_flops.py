"""The hand count of FLOPs is what XLA counts; frozen towers cost no weight gradient.

XLA counts the body of a loop once, whatever its trips. So loops are unrolled here, by a scan that
is told to; nothing is compiled or computed. Widths, lengths and pixels are the published ones.
Depths are two layers, which says the same: counts are linear in depth. At full depth, which takes
20 seconds a recipe, the test is `full_size`.
"""

import functools

import jax
import pytest
from ml_collections import ConfigDict

import tests.tiny as tiny
from blip2_jax import cli, recipe
from blip2_jax.planning import chips
from blip2_jax.stages.flops import flops_per_sample
from blip2_jax.weights import published

pytestmark = pytest.mark.integration


def counted_by_xla(config, monkeypatch) -> tuple[float, recipe.Recipe]:
    """FLOPs of one sample, of the step as it is traced: nothing is computed again, no loops."""
    for tower in ("vit", "qformer", "llm"):
        config.model[tower].remat = "none"
    config.model.qformer.dropout = 0.0  # random bits are no matrix products
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    devices = jax.devices()[:2] if config.stage.name == "stage1" else jax.devices()[:1]
    run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, devices))
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = run.train_step.lower(run.abstract_state, run.abstract_frozen, run.abstract_batch, key)
    return lowered.cost_analysis()["flops"] / config.data.batch_size, run


# One of each kind: contrast, OPT, T5, a trained encoder at 364 pixels, Llama with a prompt.
RECIPES = [
    "stage1.py",
    "stage2.py",
    "stage2.py:vitl-flant5xl-paper",
    "stage2.py:vitg-flant5xxl-paper",
    "finetune_caption.py",
    "instruct.py",
]


DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers")


@pytest.mark.parametrize("depth", [2, pytest.param(0, marks=pytest.mark.full_size)])
@pytest.mark.parametrize("name", RECIPES)
def test_the_hand_count_is_xlas_within_3_percent(name, depth, monkeypatch):
    config = ConfigDict(cli.load_config(f"configs/{name}").to_dict())
    if depth:
        config.model.vit.layers = config.model.qformer.num_layers = depth
        for tower, sizes in published.CONFIGS.items():
            shallow = {key: depth for key in DEPTHS if key in sizes}
            monkeypatch.setitem(published.CONFIGS, tower, {**sizes, **shallow})
    counted, run = counted_by_xla(config, monkeypatch)
    by_hand = sum(f.total for f in flops_per_sample(run.config, run.model_config).values())
    assert by_hand == pytest.approx(counted, rel=0.03)


def test_a_frozen_tower_costs_no_weight_gradient():
    def count(*also_trained):
        config = tiny.config("stage2")
        config.trainable = (*config.trainable, *also_trained)
        run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, jax.devices()[:1]))
        return flops_per_sample(config, run.model_config)

    frozen, vit, llm = count(), count("vit"), count("llm")
    assert frozen["vit"].backward == 0
    pixels = 2 * 2**2 * 3 * 8**2 * 24  # FLOPs of a gradient that nobody wants
    assert vit["vit"].backward == 2 * vit["vit"].forward - pixels
    assert frozen["llm"].backward < llm["llm"].backward == 2 * llm["llm"].forward
    assert frozen["qformer"].backward == 2 * frozen["qformer"].forward


def test_chips_are_found_by_what_jax_calls_them():
    names = {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
    }
    assert {kind: chips.of_device_kind(kind).name for kind in names} == names
    assert chips.of_device_kind("cpu") is None
