"""Batches and meshes that a slice divides."""

from ml_collections import ConfigDict

from blip2_jax import cli
from blip2_jax.planning import topology
from blip2_jax.planning.candidates import candidates, nearest_batch


def test_the_nearest_batch_sees_as_many_samples():
    config = ConfigDict(cli.load_config("configs/finetune_vqa.py").to_dict())
    near, note = nearest_batch(config, topology.parse("v6e-256"))
    assert near.data.batch_size == 256 and "recipe's is 128" in note
    assert f"--config.steps={round(config.steps / 2)}" in note
    same, note = nearest_batch(near, topology.parse("v6e-256"))
    assert same.data.batch_size == 256 and note == ""


def test_a_search_tries_only_meshes_that_divide():
    config = ConfigDict(cli.load_config("configs/stage2.py").to_dict())
    tpu_slice = topology.parse("2xv5e-16")
    by_mesh = list(candidates(config, tpu_slice))
    for own, *leaner in by_mesh:
        data, fsdp, tensor = own.mesh.data, own.mesh.fsdp, own.mesh.tensor
        assert data * fsdp * tensor == 32 and data % 2 == 0  # only `data` crosses slices
        assert config.data.batch_size % (data * fsdp) == 0
        assert [c.stage.accumulate for c in leaner] == sorted(c.stage.accumulate for c in leaner)
    assert (2, 16, 1) == tuple(by_mesh[0][0].mesh[axis] for axis in ("data", "fsdp", "tensor"))
