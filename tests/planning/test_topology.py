"""Slices are named as in the cloud."""

import pytest

from blip2_jax.planning import topology


@pytest.mark.parametrize(
    ("name", "chip", "shape", "count"),
    [
        ("v5e-256", "v5e", (16, 16), 1),
        ("v5litepod-16", "v5e", (4, 4), 1),
        ("v6e-64", "v6e", (8, 8), 1),
        ("v5p-128", "v5p", (4, 4, 4), 1),  # TensorCores, two a chip
        ("v4-8", "v4", (2, 2, 1), 1),
        ("v5p-4x4x8", "v5p", (4, 4, 8), 1),
        ("2xv5e-256", "v5e", (16, 16), 2),
    ],
)
def test_names_of_the_cloud(name, chip, shape, count):
    tpu_slice = topology.parse(name)
    assert (tpu_slice.chip.name, tpu_slice.shape, tpu_slice.num_slices) == (chip, shape, count)


@pytest.mark.parametrize("name", ["v5e-48", "v7-8", "v5p-3", "h100-8", "v5e-4x4x4", "0xv5e-16", ""])
def test_an_unknown_slice_lists_those_there_are(name):
    with pytest.raises(ValueError, match=r"v5p-128(.|\n)*v5e-256"):
        topology.parse(name)


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    def missing(**_):
        raise RuntimeError("Could not find libtpu.so")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
    with pytest.raises(topology.NoCompiler, match=r"Could not find libtpu.*pip install .*\[plan\]"):
        topology.parse("v5e-4").devices()
