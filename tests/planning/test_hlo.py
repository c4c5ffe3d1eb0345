"""Collectives and products of compiled programs count as often as they run."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip2_jax.planning import hlo
from blip2_jax.runtime import mesh as meshes

LAYERS, ROWS, WIDTH = 5, 16, 32


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})


def read(function, mesh, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return hlo.read(text, mesh.shape)


def array(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )


def test_a_scan_counts_each_of_its_turns(mesh):
    """Weights of every layer are gathered along `fsdp`, and used, once a layer."""

    def run(x, weights):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    x = array(mesh, (ROWS, WIDTH), ("data", "fsdp"))
    weights = array(mesh, (LAYERS, WIDTH, WIDTH), None, "fsdp")
    program = read(run, mesh, x, weights)
    gathers = [c for c in program.collectives if c.kind == "all-gather"]
    assert sum(c.times for c in gathers) in (1, LAYERS)  # XLA may gather the stack before the loop
    assert {c.axes for c in gathers} == {("fsdp",)}
    assert sum(c.sent for c in gathers) == LAYERS * WIDTH * WIDTH * 4 * 3 / 4
    assert program.flops == 2 * LAYERS * (ROWS / 8) * WIDTH * WIDTH
    assert program.open_loops == 0


def test_a_sum_goes_round_twice_along_the_axes_that_it_is_over(mesh):
    def total(x):
        return jax.lax.with_sharding_constraint(x.sum(0), NamedSharding(mesh, PartitionSpec()))

    program = read(total, mesh, array(mesh, (ROWS, 1000), ("data", "fsdp")))
    (reduce,) = [c for c in program.collectives if c.kind == "all-reduce"]
    assert reduce.axes == ("data", "fsdp") and reduce.devices == 8
    assert reduce.sent == 2 * 1000 * 4 * 7 / 8


def test_a_ring_inside_a_loop_counts_its_turns(mesh):
    axes = ("data", "fsdp")
    spec = PartitionSpec(axes)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def ring(x):
        def step(x, _):
            return (jax.lax.ppermute(x, axes, [(i, (i + 1) % 8) for i in range(8)]), None)

        return jax.lax.scan(step, x, None, length=7)[0]

    program = read(ring, mesh, array(mesh, (ROWS, 10), axes))
    (permute,) = program.collectives
    assert permute.kind == "collective-permute" and permute.times == 7
    assert permute.sent == 7 * (ROWS / 8) * 10 * 4


def test_a_loop_of_unknown_length_counts_once_and_is_reported(mesh):
    def run(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)

    one = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    program = read(run, mesh, one, jax.ShapeDtypeStruct((), jnp.int32))
    assert program.open_loops == 1 and program.flops == 2 * 8**3


# What a compiler for TPUs writes, cut to what matters.
TPU = """
HloModule jit_train_step, is_scheduled=true

%start (p: bf16[2,64]) -> (bf16[2,64], bf16[8,64], u32[]) {
  %p = bf16[2,64]{1,0:T(2,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %custom-call = (bf16[2,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (q: bf16[2,64], w: bf16[64,16]) -> bf16[2,16] {
  %q = bf16[2,64]{1,0} parameter(0)
  %w = bf16[64,16]{1,0} parameter(1)
  %all-gather.2 = bf16[8,64]{1,0} all-gather(%q), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %convolution.1 = bf16[2,16]{1,0} convolution(%q, %w), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (g: f32[64,16]) -> f32[8,16] {
  %g = f32[64,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[64,16]{1,0} all-reduce(%g), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %dynamic-slice = f32[8,16]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,16}
}

%next (n: u32[]) -> u32[] {
  %n = u32[] parameter(0)
  %two = u32[] constant(2)
  ROOT %add.1 = u32[] add(%n, %two)
}

%body (state: (bf16[2,64], u32[])) -> (bf16[2,64], u32[]) {
  %state = (bf16[2,64]{1,0:T(2,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %turn = u32[]{:T(128)} get-tuple-element(%state), index=1
  %x = bf16[2,64]{1,0} get-tuple-element(%state), index=0
  %w = bf16[64,16]{1,0} constant({...})
  %fusion.1 = bf16[2,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%piece
  %permute-start = (bf16[2,64]{1,0}, bf16[2,64]{1,0}, u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}
  %permute-done = bf16[2,64]{1,0} collective-permute-done(%permute-start)
  %fusion.2 = u32[] fusion(%turn), kind=kLoop, calls=%next
  ROOT %tuple.2 = (bf16[2,64]{1,0}, u32[]) tuple(%permute-done, %fusion.2)
}

%condition (state: (bf16[2,64], u32[])) -> pred[] {
  %state.1 = (bf16[2,64]{1,0}, u32[]) parameter(0)
  %limit = u32[]{:T(128)} constant(8)
  %turn.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  ROOT %compare = pred[]{:T(512)} compare(%turn.1, %limit), direction=LT
}

ENTRY %main (a: bf16[2,64], b: f32[64,16]) -> bf16[2,64] {
  %a = bf16[2,64]{1,0} parameter(0)
  %b = f32[64,16]{1,0} parameter(1)
  %zero.1 = u32[] constant(0)
  %async = (bf16[2,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %tuple.1 = (bf16[2,64]{1,0}, u32[]) tuple(%a, /*index=1*/%zero.1)
  %while = (bf16[2,64]{1,0:T(2,128)(2,1)S(1)}, u32[]{:T(128)}) while(%tuple.1), condition=%condition, body=%body
  %scatter = f32[8,16]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %q.1 = bf16[4,6,8]{2,1,0} constant({...})
  %k.1 = bf16[4,6,8]{2,1,0} constant({...})
  %scores = f32[4,6,6]{2,1,0} convolution(%q.1, %k.1), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  ROOT %out = bf16[2,64]{1,0} get-tuple-element(%while), index=0
}
"""  # noqa: E501


def test_what_a_compiler_for_tpus_writes(mesh):
    """A gather in pieces counts where it starts; a fused sum and split is a reduce-scatter; a
    counter may go by twos; a batched product is a convolution with holes."""
    program = hlo.read(TPU, mesh.shape)
    by_kind = {c.kind: c for c in program.collectives}
    assert len(program.collectives) == len(by_kind) == 3
    gather, permute = by_kind["all-gather"], by_kind["collective-permute"]
    scatter = by_kind["reduce-scatter"]
    assert gather.times == 1 and gather.axes == ("fsdp",) and gather.sent == 2 * 64 * 2 * 3
    assert permute.times == 4 and permute.axes == ("data",) and permute.sent == 4 * 2 * 64 * 2
    assert scatter.axes == ("data", "fsdp") and scatter.sent == 64 * 16 * 4 * 7 / 8
    assert program.flops == 4 * (2 * 2 * 64 * 16) + 2 * 4 * 6 * 6 * 8


SLICES = """
HloModule jit_train_step, num_partitions=4

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %all-reduce = f32[8,128]{1,0} all-reduce(%a), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%all-reduce, %after-all), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[8,128]{1,0} copy(%all-reduce)
}
"""  # noqa: E501


def test_between_slices_hosts_send(mesh):
    """The program is one slice's, whose groups count its own chips."""
    near, far = hlo.read(SLICES, mesh.shape, num_slices=2).collectives
    assert near.axes == ("fsdp",) and not near.crosses_slices
    assert far.axes == ("data",) and far.crosses_slices and far.kind == "all-reduce"
    assert far.sent == 2 * 8 * 128 * 4 / 2


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", [0, 2]),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", [0, 2]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", list(range(8))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups_in_all_their_spellings(groups, members):
    assert hlo._groups(f"channel_id=1, {groups}, dimensions={{0}}", 8) == (members, len(members))


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("nothing", {"data": 1})
