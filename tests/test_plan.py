"""What `blip2 plan` promises: it plans the program that is trained, and says what is wrong."""

import importlib.util
import json
import logging
import math

import jax
import numpy as np
import pytest

import tests.tiny as tiny
from blip2_jax import cli, plan, recipe
from blip2_jax.data import digits as scenes
from blip2_jax.data import loader
from blip2_jax.data.examples import make_example
from blip2_jax.runtime import slices

compiles_for_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install blip2_jax[plan]"
)


@pytest.fixture(autouse=True)
def other_tests_hear_warnings():
    yield
    logging.getLogger(recipe.meshes.__name__).setLevel(logging.NOTSET)


def digits(stage, *overrides):
    return cli.load_config(f"configs/digits/{stage}.py", overrides)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.mark.parametrize("stage", ["stage1", "stage2", "vit_easy", "lm_easy"])
def test_the_planned_batch_is_the_loaders(stage):
    """Names, shapes and dtypes, of examples made by the loader's own code."""
    config = digits(stage)
    run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, jax.devices()[:1]))
    if stage == "lm_easy":
        record = loader.make_source(config, config.data.split)[0]
    else:
        record = scenes.record(0, "train", 0)
        record["image"] = record["image"].getvalue()
    make = make_example(config, run.image_size, train=True, llm=run.llm)
    example = make(record, 0, np.random.default_rng(0))
    planned = {k: (x.shape[1:], x.dtype) for k, x in run.abstract_batch.items()}
    assert planned == {k: (np.shape(x), np.asarray(x).dtype) for k, x in example.items()}
    assert {x.shape[0] for x in run.abstract_batch.values()} == {config.data.batch_size}


@compiles_for_tpu
@pytest.mark.parametrize(
    ("name", "data", "fsdp"),
    [("v6e-64", 4, 16), ("v6e-256", 16, 16), ("v5p-128", 2, 32), ("2xv6e-64", 8, 16)],
)
def test_a_mesh_fits_any_torus(name, data, fsdp):
    """Also where an axis takes a part of one of the torus's: 16 of 8 by 8 chips."""
    devices = slices.parse(name).devices()
    mesh = recipe.meshes.make_mesh({"data": data, "fsdp": fsdp, "tensor": 1}, devices)
    assert mesh.devices.shape == (data, fsdp, 1) and set(mesh.devices.flat) == set(devices)
    assert all(len({getattr(d, "slice_index", 0) for d in row.flat}) == 1 for row in mesh.devices)


@compiles_for_tpu
@pytest.mark.parametrize(("stage", "axis"), [("stage1", "data"), ("stage2", "fsdp")])
def test_a_small_recipe_on_a_small_slice(stage, axis, workdir):
    split = {"mesh.data": 1, "mesh.fsdp": 1, f"mesh.{axis}": 4}
    # The smallest that compiles in seconds: stage 1 has four passes of the Q-Former.
    config = tiny.config(stage, **split) if stage == "stage1" else digits(stage)
    found = plan.make_plan(config, slices.parse("v6e-4"), workdir)
    assert found["fits"] and found["chips"] == 4 and found["mesh"][axis] == 4

    m, held = found["memory"], found["parameters"]
    # Arguments are the state, the frozen towers and a batch; the state is donated whole.
    devices = slices.parse("v6e-4").devices()
    run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, devices))
    state = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(run.abstract_state)
    )
    assert held["per_chip"] <= m["arguments"] < 2 * held["per_chip"] + 2**22
    assert state <= m["donated"] <= m["outputs"]
    assert 0 < m["temporaries"] < m["peak"] < m["usable"]

    kinds = {c["kind"] for c in found["collectives"]}
    assert {"all-gather", "all-reduce"} <= kinds, kinds
    assert ("ragged-all-to-all" in kinds) == (stage == "stage1")  # hard negatives
    assert {name for c in found["collectives"] for name in c["axes"]} == {axis}

    # The compiler's products are the hand count's, and what is computed twice.
    by_hand = found["flops_per_sample"]["all"] * config.data.batch_size / 4
    assert 0.9 * by_hand < found["flops_per_chip"] < 1.6 * by_hand
    assert found["samples_per_second"]["expected"] <= found["samples_per_second"]["at_most"]


@compiles_for_tpu
def test_the_command_prints_and_keeps_a_plan(workdir, capsys):
    """The second time nothing is compiled."""
    words = ["--config=configs/digits/stage2.py", "--topology=v5e-4", f"--workdir={workdir}"]
    assert plan.main(words) == 0
    said = capsys.readouterr()
    assert "Measured by the compiler" in said.out and "all-gather" in said.out
    kept = json.loads((workdir / "digits-stage2.v5e-4.b64.1x4x1.json").read_text())
    assert kept["fits"] and f"{kept['samples_per_second']['expected']:,.0f}" in said.out
    assert plan.main(words) == 0
    assert "Compiling" not in capsys.readouterr().err


@compiles_for_tpu
def test_a_batch_that_the_slice_does_not_divide_names_the_nearest(workdir, capsys):
    words = ["--config=configs/stage1.py", "--topology=v5e-256", f"--workdir={workdir}"]
    assert plan.main(words) == 2
    said = capsys.readouterr().err
    assert "1680 does not divide" in said and "--config.data.batch_size=1792" in said
    assert "--config.optim.peak_lr=0.0001033" in said  # 1e-4 * sqrt(1792 / 1680)


def test_an_unknown_slice_is_an_error(capsys):
    assert plan.main(["--config=configs/stage1.py", "--topology=v9-1"]) == 2
    assert "v5p-128" in capsys.readouterr().err


def test_the_nearest_batch_sees_as_many_samples():
    config = plan.ConfigDict(cli.load_config("configs/finetune_vqa.py").to_dict())
    near, note = plan.nearest_batch(config, slices.parse("v6e-256"))
    assert near.data.batch_size == 256 and "recipe's is 128" in note
    assert f"--config.steps={round(config.steps / 2)}" in note
    same, note = plan.nearest_batch(near, slices.parse("v6e-256"))
    assert same.data.batch_size == 256 and note == ""


def test_what_does_not_fit_says_by_how_much():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (23.13G) exceeds available HBM (15.75G)."
    )
    said = plan.why_it_does_not_run(message)
    assert "Temporaries alone need 23.13" in said and "7.38 GiB too many" in said


def test_what_the_compiler_cannot_do_there_is_not_called_too_large():
    message = "INTERNAL: RET_CHECK failure (a/b.cc:325) !x().Y() Ragged is not supported\nat ..."
    assert plan.why_it_does_not_run(message) == f"{plan.REFUSED}Ragged is not supported"


def test_a_search_tries_only_meshes_that_divide():
    config = plan.ConfigDict(cli.load_config("configs/stage2.py").to_dict())
    where = slices.parse("2xv5e-16")
    ladders = list(plan.candidates(config, where))
    for own, *leaner in ladders:
        data, fsdp, tensor = own.mesh.data, own.mesh.fsdp, own.mesh.tensor
        assert data * fsdp * tensor == 32 and data % 2 == 0  # only `data` crosses slices
        assert config.data.batch_size % (data * fsdp) == 0
        assert [c.stage.accumulate for c in leaner] == sorted(c.stage.accumulate for c in leaner)
    assert (2, 16, 1) == tuple(ladders[0][0].mesh[axis] for axis in ("data", "fsdp", "tensor"))


@compiles_for_tpu
@pytest.mark.full_size
def test_flant5xxl_fits_the_smallest_pod(workdir):
    """ViT-g + FlanT5-XXL, stage 2 at the paper's batch, on 16 chips of 16 GB (10 GB, minutes)."""
    words = ["--config.data.batch_size=1520", "--config.stage.accumulate=5"]
    config = cli.load_config("configs/stage2.py:vitg-flant5xxl-paper", words)
    found = plan.make_plan(config, slices.parse("v5e-16"), workdir)
    assert found["fits"] and found["memory"]["headroom"] > 0
    assert found["parameters"]["total"] > 24e9  # bytes; what no single chip holds
    by_hand = found["flops_per_sample"]["all"] * config.data.batch_size / 16
    # The LLM's forward is computed twice (remat), which is nearly a half more.
    assert by_hand < found["flops_per_chip"] < 1.5 * by_hand


def test_a_search_saves_memory_only_where_it_must_and_ranks(monkeypatch, tmp_path):
    tried = []

    def pretend(config, where, workdir, **_):
        """Too large in fewer than four parts; the faster, the fewer chips share parameters."""
        mesh, parts = dict(config.mesh), config.stage.accumulate
        remat = config.model.llm.remat
        tried.append((mesh["fsdp"], mesh["tensor"], parts, remat))
        rate = {"expected": 1000 / mesh["fsdp"] + (remat == "dots")}
        fits = {"fits": parts >= 4 and remat != "none", "refused": False}
        return {"mesh": mesh, "accumulate": parts, **fits, "samples_per_second": rate}

    monkeypatch.setattr(plan, "make_plan", pretend)
    config = plan.ConfigDict(cli.load_config("configs/stage2.py").to_dict())
    plans = plan.search(config, slices.parse("v5e-4"), tmp_path, tries=20)
    down = [(4, 1, parts, "full") for parts in (1, 2, 3, 4)]
    assert tried[:6] == [*down, (2, 1, 4, "full"), (1, 1, 4, "full")]
    # On the best mesh, also what computes less again.
    assert tried[-2:] == [(1, 1, 4, "none"), (1, 1, 4, "dots")]
    assert plans[0]["samples_per_second"]["expected"] == 1001
    fits = [p["fits"] for p in plans]
    assert fits == sorted(fits, reverse=True) and fits.count(False) == 4
    tried.clear()
    plan.search(config, slices.parse("v5e-4"), tmp_path, tries=5)
    assert len(tried) == 5
