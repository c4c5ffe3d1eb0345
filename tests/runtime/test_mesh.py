import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from blip2_jax.runtime import mesh as mesh_lib

RULES = {"embed": "fsdp", "mlp": "tensor", "vocab": "fsdp", "batch": ("data", "fsdp"), "norm": None}
AXES = (
    (r"kernel$", ("embed", "mlp")),
    (r"embedding$", ("vocab", "embed")),
    (r"(bias|temp)$", ()),
)


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh({"data": 1, "fsdp": -1, "tensor": 2})


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    examples = np.arange(24).reshape(8, 3)
    batch = mesh_lib.global_batch({"x": examples}, mesh, 8)
    assert batch["x"].sharding == mesh_lib.batch_sharding(mesh)
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["x"], examples)


def test_a_batch_is_the_same_whatever_the_order_of_the_devices():
    examples = np.arange(24).reshape(8, 3)
    for order in (range(8), (0, 4, 1, 5, 2, 6, 3, 7), (7, 2, 5, 0, 1, 6, 3, 4)):
        devices = [jax.devices()[i] for i in order]
        mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
        batch = mesh_lib.global_batch({"x": examples[mesh_lib.local_rows(mesh, 8)]}, mesh, 8)
        np.testing.assert_array_equal(batch["x"], examples)


def test_a_batch_that_does_not_divide_is_refused(mesh):
    with pytest.raises(ValueError, match="A batch of 6 does not divide over the 4 devices"):
        mesh_lib.local_rows(mesh, 6)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_minus_one_takes_the_devices_that_are_left(mesh):
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert mesh_lib.batch_sharding(mesh).spec == P(("data", "fsdp"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 1, "fsdp": -1, "tensor": 3}, "multiple of 3 devices, but there are 8"),
        ({"data": 1, "fsdp": 2, "tensor": 2}, "asks for 4 devices, but there are 8"),
        ({"data": -1, "fsdp": -1, "tensor": 1}, "at most one is -1"),
        ({"data": 0, "fsdp": -1, "tensor": 1}, "positive number"),
        ({"data": 1, "model": 8}, "it needs"),
    ],
)
def test_a_mesh_that_does_not_divide_says_so(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh_lib.make_mesh(sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX says of a chip, for two slices of 2 x 2 chips."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def slice_index(self):
        return self.id // 4

    process_index = slice_index

    @property
    def coords(self):
        return (self.id % 2, self.id % 4 // 2, 0)


def slice_devices():
    return [Chip(i) for i in range(8)]


def test_only_the_data_axis_crosses_slices():
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": -1, "tensor": 2}, slice_devices())
    slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
    assert mesh.devices.shape == (2, 2, 2)
    assert slices == [[0] * 4, [1] * 4]


def test_slices_that_data_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="2 TPU slices .* --config.mesh.data=2"):
        mesh_lib.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, slice_devices())


def test_names_are_aligned_to_the_trailing_dimensions(mesh):
    tree = {"layers": {"kernel": shape(3, 8, 16), "bias": shape(3, 16)}, "temp": shape()}
    placed = mesh_lib.shardings(tree, AXES, RULES, mesh)
    assert placed["layers"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert placed["layers"]["bias"].spec == P(None, None)
    assert placed["temp"].spec == P()
    assert jax.tree.structure(placed) == jax.tree.structure(tree)


def test_all_uncovered_leaves_are_listed(mesh):
    tree = {"a": {"kernel": shape(8, 8), "scale": shape(8)}, "b": [shape(2)]}
    with pytest.raises(ValueError, match="covers 2 parameters") as error:
        mesh_lib.shardings(tree, AXES, RULES, mesh)
    assert "a/scale [8]" in str(error.value)
    assert "b/0 [2]" in str(error.value)
    assert "a/kernel" not in str(error.value)


def test_an_indivisible_dimension_is_kept_whole_and_reported(mesh, caplog):
    tree = {"kernel": shape(6, 16)}
    placed = mesh_lib.shardings(tree, AXES, RULES, mesh)
    assert placed["kernel"].spec == P(None, "tensor")
    assert "embed=6 is not divisible by fsdp=4" in caplog.text
    summary = mesh_lib.placement_summary(mesh_lib.placements_of(tree, AXES, RULES, mesh), mesh)
    assert "kernel [6, 16]: embed=6 is not divisible" in summary


def test_one_mesh_axis_splits_one_dimension(mesh):
    (placement,) = mesh_lib.placements_of({"embedding": shape(16, 8)}, AXES, RULES, mesh)
    assert placement.spec == P("fsdp", None)
    assert "embed=8 is kept whole" in placement.notes[0]


@pytest.mark.parametrize(
    ("axes", "rules", "message"),
    [
        (AXES, {"embed": "fsdp"}, r"No rule for the axis names \['mlp', 'vocab'\]"),
        (AXES, RULES | {"mlp": "model"}, "'mlp' -> 'model' names no mesh axis"),
        (((r".", ("vocab", "embed", "mlp")),), RULES, "kernel has 2 dimensions"),
    ],
)
def test_a_wrong_table_or_rule_is_refused(mesh, axes, rules, message):
    with pytest.raises(ValueError, match=message):
        mesh_lib.shardings({"kernel": shape(8, 8)}, axes, rules, mesh)


def test_the_summary_counts_bytes_on_a_device(mesh):
    placed = mesh_lib.placements_of(
        {"kernel": shape(512, 1024), "bias": shape(1024)}, AXES, RULES, mesh
    )
    summary = mesh_lib.placement_summary(placed, mesh)
    assert "2 arrays, 2.0 MiB in all, 0.3 MiB on each device; 0.2 % of the bytes" in summary
