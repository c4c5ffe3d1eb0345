"""Plans hold to what the compiler and the hand count say."""

import importlib.util
import math

import jax
import pytest

import tests.tiny as tiny
from blip2_jax import cli, recipe
from blip2_jax.planning import topology
from blip2_jax.planning.estimate import make_plan

compiles_for_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install blip2_jax[plan]"
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@compiles_for_tpu
@pytest.mark.parametrize(("stage", "axis"), [("stage1", "data"), ("stage2", "fsdp")])
def test_a_small_recipe_on_a_small_slice(stage, axis, workdir):
    split = {"mesh.data": 1, "mesh.fsdp": 1, f"mesh.{axis}": 4}
    # The smallest that compiles in seconds: stage 1 has four passes of the Q-Former.
    config = (
        tiny.config(stage, **split)
        if stage == "stage1"
        else cli.load_config(f"configs/digits/{stage}.py")
    )
    plan = make_plan(config, topology.parse("v6e-4"), workdir)
    assert plan["fits"] and plan["chips"] == 4 and plan["mesh"][axis] == 4

    m, held = plan["memory"], plan["parameters"]
    # Arguments are the state, the frozen towers and a batch; the state is donated whole.
    devices = topology.parse("v6e-4").devices()
    run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, devices))
    state = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(run.abstract_state)
    )
    assert held["per_chip"] <= m["arguments"] < 2 * held["per_chip"] + 2**22
    assert state <= m["donated"] <= m["outputs"]
    assert 0 < m["temporaries"] < m["peak"] < m["usable"]

    kinds = {c["kind"] for c in plan["collectives"]}
    assert {"all-gather", "all-reduce"} <= kinds, kinds
    assert ("ragged-all-to-all" in kinds) == (stage == "stage1")  # hard negatives
    assert {name for c in plan["collectives"] for name in c["axes"]} == {axis}

    # The compiler's products are the hand count's, and what is computed twice.
    by_hand = plan["flops_per_sample"]["all"] * config.data.batch_size / 4
    assert 0.9 * by_hand < plan["flops_per_chip"] < 1.6 * by_hand
    assert plan["samples_per_second"]["expected"] <= plan["samples_per_second"]["at_most"]


@compiles_for_tpu
@pytest.mark.full_size
def test_flant5xxl_fits_the_smallest_pod(workdir):
    """ViT-g + FlanT5-XXL, stage 2 at the paper's batch, on 16 chips of 16 GB (10 GB, minutes)."""
    overrides = ["--config.data.batch_size=1520", "--config.stage.accumulate=5"]
    config = cli.load_config("configs/stage2.py:vitg-flant5xxl-paper", overrides)
    plan = make_plan(config, topology.parse("v5e-16"), workdir)
    assert plan["fits"] and plan["memory"]["headroom"] > 0
    assert plan["parameters"]["total"] > 24e9  # bytes; what no single chip holds
    by_hand = plan["flops_per_sample"]["all"] * config.data.batch_size / 16
    # The LLM's forward is computed twice (remat), which is nearly a half more.
    assert by_hand < plan["flops_per_chip"] < 1.5 * by_hand
