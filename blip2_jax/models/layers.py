"""What every tower is built from: linear layers, feed-forwards, norms, a scanned stack of blocks.

Modules hold parameters and nothing else: no randomness, no sharding, no caches. Dropout keys,
caches and masks come in with the call; `key=None` means "deterministic".

Shape words, here and in every tower: `B` batch, `Q` queries, `T` text tokens, `N` image tokens,
`S` positions of a cache, `H` heads, `K` width of a head, `D` width of the model, `L` layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, get_abstract_mesh

# By the names that transformers has for them.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # erf: what BERT, EVA and FlanT5 here use
    "gelu_python": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),  # tanh: stock FlanT5
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Which axes the parameters of these layers have, by path; names stand for the trailing dimensions,
# so the leading axis of a stack needs none. `runtime.mesh` maps names to mesh axes by config.
AXES = (
    (r"(q|k|v)_proj/kernel$", ("embed", "heads")),
    (r"(q|k|v)_proj/bias$", ("heads",)),
    (r"out_proj/kernel$", ("heads", "embed")),
    (r"fc1/kernel$", ("embed", "mlp")),
    (r"fc1/bias$", ("mlp",)),
    (r"fc2/kernel$", ("mlp", "embed")),
    (r"(out_proj|fc2)/bias$", (None,)),
    (r"mlp/(gate|up)/kernel$", ("embed", "mlp")),
    (r"mlp/down/kernel$", ("mlp", "embed")),
    (r"lm_head/kernel$", ("embed", "vocab")),
    (r"lora_a$", ("embed", None)),
    (r"lora_b$", (None, "heads")),
    (r"relative_bias/embedding$", (None, "heads")),
    (r"embed_tokens/embedding$|word_embeddings/embedding$", ("vocab", "embed")),
    (r"embed_positions/embedding$|position_embeddings/embedding$", (None, "embed")),
    (r"norm[^/]*/(scale|bias)$|ln_[^/]*/(scale|bias)$", (None,)),
)

Block = TypeVar("Block", bound=nnx.Module)


def normal(std: float) -> Callable[..., jax.Array]:
    """An initializer: (key, shape, dtype) -> draws from N(0, std)."""
    return nnx.initializers.normal(std)


def shard_batch(x: jax.Array, axes: tuple[str, ...] = ("data", "fsdp")) -> jax.Array:
    """Shards the first axis, the batch, over the mesh's batch axes; other axes are unconstrained.

    Without it XLA may shard activations as their weights are sharded, and give every device the
    whole batch. Without a mesh in context (`recipe.build` sets it) this does nothing.
    """
    if get_abstract_mesh().empty:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free))


class Linear(nnx.Linear):
    """A linear layer whose output is sharded over the batch: weights are gathered, not examples."""

    lora_scale = 0.0  # see `models.lora`, which also adds these two:
    lora_a: nnx.Param[jax.Array]
    lora_b: nnx.Param[jax.Array]

    # The output's sharding is decided here, so Flax's second argument is not offered.
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """float[..., D_in] -> float[..., D_out], with the low-rank path where there is one."""
        y = super().__call__(x)
        if self.lora_scale:
            a, b = (p[...].astype(y.dtype) for p in (self.lora_a, self.lora_b))
            y = y + self.lora_scale * (x.astype(y.dtype) @ a @ b)
        return shard_batch(y)


class Embed(nnx.Embed):
    """An embedding table; embeddings of a batch, int32[B, T], are sharded over the batch.

    Each device looks up its part of the table's width for the examples of its `fsdp` group; then
    the result is resharded. As one constraint, XLA would give every device the whole batch.
    """

    # The output's sharding is decided here, so Flax's second argument is not offered.
    def __call__(self, ids: jax.Array) -> jax.Array:  # type: ignore[override]
        """int32[...] -> float[..., D]."""
        x = super().__call__(ids)
        return shard_batch(shard_batch(x, ("data",))) if ids.ndim > 1 else x


def vocabulary_logits(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """Logits of every token: float[B, T, D] and the output matrix [D, V] -> float32[B, T, V]."""
    table = table.astype(hidden.dtype)
    return shard_batch(jnp.einsum("btd,dv->btv", hidden, table, preferred_element_type=jnp.float32))


def linear(
    d_in: int,
    d_out: int,
    *,
    bias: bool = True,
    std: float = 0.02,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> Linear:
    """A linear layer with N(0, std) weights and zero bias, computed in `dtype`."""
    return Linear(d_in, d_out, use_bias=bias, kernel_init=normal(std), dtype=dtype, rngs=rngs)


def layer_norm(width: int, *, eps: float, dtype: Any = None, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics.

    The variance is taken in two passes: Flax's one-pass default errs by 4e-2 on residual streams
    with a large mean, such as a ViT's, where two passes err by 3e-5.
    """
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without a key or with rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def split_key(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """`n` keys of one, or `n` times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


class MLP(nnx.Module):
    """Two linear layers with an activation between them (names as in the ViTs and in OPT)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        bias: bool = True,
        std: float = 0.02,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.fc1 = linear(width, hidden, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., D]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), without biases: T5 v1.1's and Llama's feed-forward."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.gate = linear(width, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.up = linear(width, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, width, bias=False, dtype=dtype, rngs=rngs)
        self.activation, self.dropout_rate = activation, dropout_rate

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """float[..., D] -> float[..., D]; with a key, dropout before the last layer (T5's)."""
        hidden = ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        return self.down(dropout(hidden, self.dropout_rate, key))


def rms_norm(width: int, *, eps: float, dtype: Any = None, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root-mean-square norm with float32 statistics (T5's and Llama's)."""
    return nnx.RMSNorm(width, epsilon=eps, dtype=dtype, rngs=rngs)


class Stack(nnx.Module, Generic[Block]):
    """`depth` blocks of one kind, run one after the other.

    Scanned (`scan=True`), parameters are stacked on a leading axis L and one `lax.scan` runs them:
    compile time does not grow with depth, and a checkpoint holds one array per kind of parameter.
    Training wants that. Decoding does not: a scan copies each layer's weights out of their stack
    for every token. There, `blocks` is a list, and per-layer values are lists too.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], Block],
        depth: int,
        *,
        remat: str = "none",
        scan: bool = True,
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"Unknown remat policy {remat!r}; known: {', '.join(REMAT_POLICIES)}.")
        self.depth, self.remat, self.scan = depth, remat, scan
        # One block with a leading axis on all that it holds, or a list of blocks.
        self.blocks: Any = (
            jax.vmap(make)(rngs.split(depth))
            if scan
            else nnx.List([make(rngs) for _ in range(depth)])
        )

    def __call__(
        self,
        step: Callable[[Block, Any, Any], tuple[Any, Any]],
        carry: Any,
        xs: Any = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Runs `carry, y = step(block, carry, x)` through all blocks.

        Args:
          step: called as `step(block, carry, (x, key))`; x is the layer's part of `xs` and key
            its own randomness (None when deterministic).
          carry: what is handed from block to block.
          xs: pytree with leading axis L (per-layer caches), or None; in a stack that is not
            scanned, a list of L pytrees.
          key: randomness for dropout, or None.

        Returns:
          The last carry, and the y's stacked on a leading axis L, or as a list.
        """
        keys = None if key is None else jax.random.split(key, self.depth)
        if not self.scan:
            ys = []
            for i, block in enumerate(self.blocks):
                x = None if xs is None else xs[i]
                carry, y = step(block, carry, (x, None if keys is None else keys[i]))
                ys.append(y)
            return carry, ys
        graph, params = nnx.split(self.blocks)

        def body(carry: Any, layer: Any) -> tuple[Any, Any]:
            params, x, key = layer
            carry, y = step(nnx.merge(graph, params), carry, (x, key))
            return jax.tree.map(shard_batch, carry), y

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(body, jax.tree.map(shard_batch, carry), (params, xs, keys))

    def zip_layers(self, *xs: Any) -> Any:
        """Several per-layer values as one, for `xs` of a call."""
        return xs if self.scan else list(zip(*xs, strict=True))

    def empty_cache(self, shape: Sequence[int], dtype: Any) -> Any:
        """Keys and values of every layer, each of `shape`, all zero."""
        if self.scan:
            zeros = jnp.zeros((self.depth, *shape), dtype)
            return zeros, zeros
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.depth)]

    def map(self, function: Callable[[Block], Any]) -> Any:
        """`function(block)` of every block, with per-layer results as `__call__` gives them."""
        if not self.scan:
            return [function(block) for block in self.blocks]
        graph, params = nnx.split(self.blocks)
        return jax.vmap(lambda p: function(nnx.merge(graph, p)))(params)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of scanned stacks, as the same stacks have them when they are not scanned.

    Args:
      params: nested dict of arrays; under every key "blocks", they have a leading axis L. They
        are given up one by one, so that memory is not needed twice: do not use them afterwards.
    """
    out: dict[str, Any] = {}
    for name, part in params.items():
        if name == "blocks":
            leaves, structure = jax.tree.flatten(part)
            layers = zip(*map(_split, leaves), strict=True)
            out[name] = {i: jax.tree.unflatten(structure, x) for i, x in enumerate(layers)}
        else:
            out[name] = unstack(part) if isinstance(part, dict) else part
    return out


def _split(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays of a leading axis, each sharded as it was inside the stack."""
    sharding = stacked.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    layers = jax.jit(tuple, out_shardings=sharding)(stacked)
    jax.block_until_ready(layers)
    stacked.delete()
    return layers
