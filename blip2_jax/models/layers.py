"""What every tower is built from: attention, feed-forward, norms, and a scanned stack of blocks.

Modules hold parameters and nothing else: no randomness, no sharding, no caches. Dropout keys,
caches and masks come in with the call; `key=None` means "deterministic".

Shape words, here and in every tower: `B` batch, `Q` queries, `T` text tokens, `N` image tokens,
`S` positions of a cache, `H` heads, `K` width of a head, `D` width of the model, `L` layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
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

KeysValues = tuple[jax.Array, jax.Array]

Block = TypeVar("Block", bound=nnx.Module)


def normal(std: float) -> Callable[..., jax.Array]:
    """An initializer: (key, shape, dtype) -> draws from N(0, std)."""
    return nnx.initializers.normal(std)


def split_batch(x: jax.Array, axes: tuple[str, ...] = ("data", "fsdp")) -> jax.Array:
    """Holds the first axis, the batch, to the mesh's axes of the batch; the others stay free.

    Left to itself, XLA may split activations the way their weights are split, and give every
    device the whole batch. Without a mesh in context (`recipe.build` sets it) this does nothing.
    """
    if get_abstract_mesh().empty:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free))


class Linear(nnx.Linear):
    """A linear layer of a batch; weights come to where the rows are, not the other way round."""

    lora_scale = 0.0  # see `models.lora`, which also adds these two:
    lora_a: nnx.Param[jax.Array]
    lora_b: nnx.Param[jax.Array]

    # Where the result lies is decided here, so Flax's second argument is not offered.
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """float[..., D_in] -> float[..., D_out], with the low-rank path where there is one."""
        y = super().__call__(x)
        if self.lora_scale:
            a, b = (p[...].astype(y.dtype) for p in (self.lora_a, self.lora_b))
            y = y + self.lora_scale * (x.astype(y.dtype) @ a @ b)
        return split_batch(y)


class Embed(nnx.Embed):
    """An embedding table; what is looked up for a batch, int32[B, T], lies where its rows are.

    Each device reads its part of the table's width for the rows of its `fsdp` group; then these
    change places. Said in one step, XLA would give every device all rows.
    """

    # Where the result lies is decided here, so Flax's second argument is not offered.
    def __call__(self, ids: jax.Array) -> jax.Array:  # type: ignore[override]
        """int32[...] -> float[..., D]."""
        x = super().__call__(ids)
        return split_batch(split_batch(x, ("data",))) if ids.ndim > 1 else x


def vocabulary_scores(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """Scores of every token: float[B, T, D] and the output matrix [D, V] -> float32[B, T, V]."""
    table = table.astype(hidden.dtype)
    return split_batch(jnp.einsum("btd,dv->btv", hidden, table, preferred_element_type=jnp.float32))


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


class Segment(NamedTuple):
    """Keys and values that stand before a call's own: what was read or written earlier.

    Attributes:
      keys, values: float[B, H, S, K], possibly of fewer heads.
      mask: bool, broadcastable to [B, H, T, S]; False hides a key. None hides nothing.
      bias: float, broadcastable to [B, H, T, S], or None.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array | None
    bias: jax.Array | None = None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    past: Sequence[Segment] = (),
    scale: float,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    Args:
      q: float[B, H, T, K].
      k, v: float[B, H, S, K], or with fewer heads, which divide H.
      mask: bool, broadcastable to [B, H, T, S]; False hides a key. A row whose keys are all
        hidden (a padding query) attends to all of them alike: never a NaN.
      bias: float, broadcastable to [B, H, T, S], added to the scores (T5's relative positions).
      past: keys and values in front of these, under the same softmax; they are not copied.
      scale: factor on the scores.
      dropout_rate, key: dropout of the attention probabilities.

    Returns:
      float[B, H, T, K] in q's dtype.
    """
    segments = [*past, Segment(k, v, mask, bias)]
    scores = jnp.concatenate([_scores(q, segment, scale) for segment in segments], axis=-1)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key)
    ends = np.cumsum([segment.keys.shape[-2] for segment in segments])
    parts = jnp.split(probabilities, ends[:-1], axis=-1)
    read = (_read(p, segment.values) for p, segment in zip(parts, segments, strict=True))
    return cast(jax.Array, sum(read))  # there is at least one


def _scores(q: jax.Array, segment: Segment, scale: float) -> jax.Array:
    """float32[B, H, T, S]; heads that share keys are neighbors, and read them without a copy."""
    shape, k = q.shape, segment.keys
    grouped = q.reshape(shape[0], k.shape[1], -1, shape[-1])
    scores = jnp.einsum("bhtk,bhsk->bhts", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(*shape[:-1], k.shape[-2])
    if segment.bias is not None:
        scores = scores + segment.bias.astype(jnp.float32)
    if segment.mask is not None:
        scores = jnp.where(segment.mask, scores, jnp.finfo(jnp.float32).min)
    return scores


def _read(probabilities: jax.Array, v: jax.Array) -> jax.Array:
    """float32[B, H, T, S] and float[B, H, S, K] -> float[B, H, T, K]."""
    shape = probabilities.shape
    grouped = probabilities.astype(v.dtype).reshape(shape[0], v.shape[1], -1, shape[-1])
    out = jnp.einsum("bhts,bhsk->bhtk", grouped, v)
    return out.reshape(*shape[:-1], v.shape[-1])


class Attention(nnx.Module):
    """Multi-head attention with separate q, k, v and output projections.

    Args:
      width: D of the queries and of the output.
      num_heads: H.
      num_kv_heads: heads of keys and values, each shared by H / num_kv_heads query heads (GQA);
        by default H.
      head_dim: K; by default D / H.
      kv_width: width of what keys and values are made from; by default D (self-attention).
      bias: which of the projections "q", "k", "v", "o" have a bias (EVA's ViT-g has no "k").
      scale: factor on the scores; by default K ** -0.5.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_width: int | None = None,
        bias: str = "qkvo",
        scale: float | None = None,
        dropout_rate: float = 0.0,
        std: float = 0.02,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        head_dim = head_dim or width // num_heads
        kv_width = kv_width or width
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} heads of keys evenly.")
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.dropout_rate = dropout_rate
        make = lambda d_in, d_out, name: linear(  # noqa: E731
            d_in, d_out, bias=name in bias, std=std, dtype=dtype, rngs=rngs
        )
        self.q_proj = make(width, num_heads * head_dim, "q")
        self.k_proj = make(kv_width, num_kv_heads * head_dim, "k")
        self.v_proj = make(kv_width, num_kv_heads * head_dim, "v")
        self.out_proj = make(num_heads * head_dim, width, "o")

    def _heads(self, x: jax.Array) -> jax.Array:
        """float[B, T, H * K] -> float[B, H, T, K]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim).swapaxes(-2, -3)

    def queries(self, x: jax.Array) -> jax.Array:
        """Queries of x: float[B, T, D] -> float[B, H, T, K]."""
        return self._heads(self.q_proj(x))

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x: float[B, S, D_kv] -> two of float[B, H, S, K]."""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def probabilities(self, x: jax.Array, k: jax.Array) -> jax.Array:
        """Where x, float[B, T, D], looks among keys, float[B, H, S, K]: float32[B, H, T, S]."""
        scores = jnp.einsum(
            "bhtk,bhsk->bhts", self.queries(x), k, preferred_element_type=jnp.float32
        )
        return jax.nn.softmax(scores * self.scale, axis=-1)

    def __call__(
        self,
        x: jax.Array,
        keys_values: tuple[jax.Array, jax.Array] | None = None,
        *,
        queries: jax.Array | None = None,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        past: Sequence[Segment] = (),
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from x, float[B, T, D], to itself or to given keys and values.

        `queries` are those of x where the caller has made them (and turned them by position);
        `past` are keys and values in front of these.
        """
        k, v = self.keys_values(x) if keys_values is None else keys_values
        q = self.queries(x) if queries is None else queries
        out = attend(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            past=past,
            scale=self.scale,
            dropout_rate=self.dropout_rate,
            key=key,
        )
        return self.out_proj(out.swapaxes(-2, -3).reshape(*x.shape[:-1], -1))


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
            return jax.tree.map(split_batch, carry), y

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(body, jax.tree.map(split_batch, carry), (params, xs, keys))

    def together(self, *xs: Any) -> Any:
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
            split = jax.tree.map(lambda x: _split(x), part)
            depth = len(jax.tree.leaves(part)[0])
            is_split = lambda x: isinstance(x, tuple)  # noqa: E731
            out[name] = {
                i: jax.tree.map(lambda x: x[i], split, is_leaf=is_split)  # noqa: B023
                for i in range(depth)
            }
        else:
            out[name] = unstack(part) if isinstance(part, dict) else part
    return out


def _split(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays of a leading axis, each placed as it was inside the stack."""
    place = stacked.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    layers = jax.jit(tuple, out_shardings=place)(stacked)
    jax.block_until_ready(layers)
    stacked.delete()
    return layers


def causal_mask(num_queries: int, num_keys: int, offset: int = 0) -> jax.Array:
    """bool[T, S]: query t, which stands at position offset + t, sees keys 0 .. offset + t.

    For T = S = 4 and offset 0 (x: seen):

        x . . .
        x x . .
        x x x .
        x x x x
    """
    return jnp.arange(num_keys) <= offset + jnp.arange(num_queries)[:, None]


def write(cache: Any, new: Any, offset: int | jax.Array) -> Any:
    """Puts new keys and values, float[..., W, K], into a cache, float[..., S, K], at `offset`."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), offset, axis=-2
        ),
        cache,
        new,
    )
