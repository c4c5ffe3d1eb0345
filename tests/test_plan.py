"""What `blip2 plan` promises: it plans the program that is trained, and says what is wrong."""

import importlib.util
import json
import logging

import jax
import numpy as np
import pytest

import tests.data.made as made
from blip2_jax import cli, plan, recipe
from blip2_jax.data.examples import make_example
from blip2_jax.planning import topology

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


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_planned_batch_is_the_loaders(stage):
    """Names, shapes and dtypes, of examples made by the loader's own code."""
    config = digits(stage)
    run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, jax.devices()[:1]))
    record = {"image": made.jpeg(0, (64, 64)), **made.texts_about(0)}
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
    devices = topology.parse(name).devices()
    mesh = recipe.meshes.make_mesh({"data": data, "fsdp": fsdp, "tensor": 1}, devices)
    assert mesh.devices.shape == (data, fsdp, 1) and set(mesh.devices.flat) == set(devices)
    assert all(len({getattr(d, "slice_index", 0) for d in row.flat}) == 1 for row in mesh.devices)


@compiles_for_tpu
def test_the_command_prints_and_keeps_a_plan(workdir, capsys):
    """The second time nothing is compiled."""
    arguments = ["--config=configs/digits/stage2.py", "--topology=v5e-4", f"--workdir={workdir}"]
    assert plan.main(arguments) == 0
    output = capsys.readouterr()
    assert "Measured by the compiler" in output.out and "all-gather" in output.out
    kept = json.loads((workdir / "digits-stage2.v5e-4.b64.1x4x1.json").read_text())
    assert kept["fits"] and f"{kept['samples_per_second']['expected']:,.0f}" in output.out
    assert plan.main(arguments) == 0
    assert "Compiling" not in capsys.readouterr().err


@compiles_for_tpu
def test_a_batch_that_the_slice_does_not_divide_names_the_nearest(workdir, capsys):
    arguments = ["--config=configs/stage1.py", "--topology=v5e-256", f"--workdir={workdir}"]
    assert plan.main(arguments) == 2
    output = capsys.readouterr().err
    assert "1680 does not divide" in output and "--config.data.batch_size=1792" in output
    assert "--config.optim.peak_lr=0.0001033" in output  # 1e-4 * sqrt(1792 / 1680)


def test_an_unknown_slice_is_an_error(capsys):
    assert plan.main(["--config=configs/stage1.py", "--topology=v9-1"]) == 2
    assert "v5p-128" in capsys.readouterr().err
