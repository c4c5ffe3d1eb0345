"""Initialization of the Q-Former from BERT at the start of stage 1 (paper, section 3.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.runtime.mesh import nested
from blip2_jax.weights import huggingface, tables, transfer
from blip2_jax.weights.files import Renamed, Tensors, WeightsError, open_folder

EMBEDDINGS = "word_embeddings/embedding"
THEIR_EMBEDDINGS = "embeddings.word_embeddings.weight"


class _LargerVocabulary:
    """BERT's tensors, with zeros for the tokens that our vocabulary has beyond BERT's.

    Args:
      tensors: the file.
      vocab_size: rows of the word embeddings, at least as many as the file has.
    """

    def __init__(self, tensors: Tensors, vocab_size: int):
        self._tensors, self.source, self.dtypes = tensors, tensors.source, tensors.dtypes
        self.shapes = dict(tensors.shapes)
        self.shapes[THEIR_EMBEDDINGS] = (vocab_size, *tensors.shapes[THEIR_EMBEDDINGS][1:])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """See `files.Tensors.read`."""
        if name != THEIR_EMBEDDINGS:
            return self._tensors.read(name, index)
        vocab_size, known = self.shapes[name][0], self._tensors.shapes[name][0]
        start, stop, _ = (index[0] if index else slice(None)).indices(vocab_size)
        own = slice(min(start, known), min(stop, known))
        embeddings = self._tensors.read(name, (own, *index[1:]))
        return np.pad(embeddings, ((0, stop - start - len(embeddings)), (0, 0)))


def _modern_names(tensors: Tensors) -> Renamed:
    """`bert-base-uncased` under the names of a bare model of today.

    Its file is of TensorFlow's time: gamma and beta for weight and bias, all under `bert.`.
    """
    names = {}
    for old in tensors.shapes:
        new = old.removeprefix("bert.")
        if new.startswith("cls."):
            continue  # the heads of its pre-training
        new = new.replace("LayerNorm.gamma", "LayerNorm.weight")
        names[new.replace("LayerNorm.beta", "LayerNorm.bias")] = old
    return Renamed(tensors, names)


def initialize(qformer: dict[str, Any], config: QFormerConfig, source: str) -> dict[str, Any]:
    """Puts BERT's weights into a fresh Q-Former.

    Self-attention, text feed-forwards, embeddings and norms are BERT's; query feed-forwards are
    copies of the text ones (LAVIS `blip2_qformer.py`); cross-attention and the embeddings of tokens
    that BERT does not have ([DEC]) stay as they are. BERT's token types are dropped, not folded in.

    Args:
      qformer: the parameters of `models.qformer.QFormer` with its text branch; arrays whose
        shardings and dtypes are kept.
      config: its sizes.
      source: a folder with a BERT of the same sizes.

    Raises:
      WeightsError: what does not fit.
    """
    table = tables.bert_text(config.cross_attention_frequency)
    tensors: Tensors = _modern_names(open_folder(huggingface.find(source)))
    leaves = transfer.leaves_of(qformer)
    taken = {path for row in table.rows for path in row.ours}
    if not taken <= leaves.keys():
        raise WeightsError("Only a Q-Former with its text branch (stage 1) starts from BERT.")
    abstract = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for p, x in leaves.items()
        if p in taken
    }
    known = tensors.shapes.get(THEIR_EMBEDDINGS, (0, 0))[0]
    if known > config.vocab_size:
        raise WeightsError(
            f"{source} has {known} tokens, config.model.qformer.vocab_size is "
            f"{config.vocab_size}; it must be at least as large, and one larger for [DEC]."
        )
    if known:  # else `transfer.load` says that they are missing
        tensors = _LargerVocabulary(tensors, config.vocab_size)
    loaded = transfer.leaves_of(transfer.load(table, nested(abstract), tensors))
    loaded[EMBEDDINGS] = _first_rows(loaded[EMBEDDINGS], leaves[EMBEDDINGS], known)
    for path in list(loaded):
        if "/mlp_text/" in path:
            query = path.replace("/mlp_text/", "/mlp_query/")
            copy = jax.jit(jnp.copy, out_shardings=leaves[query].sharding)
            loaded[query] = copy(loaded[path])
    return nested({path: loaded.get(path, leaf) for path, leaf in leaves.items()})


def _first_rows(first: jax.Array, rest: jax.Array, count: int) -> jax.Array:
    """Rows of `first` up to `count`, then those of `rest`: on the devices that hold them."""

    def join(first: jax.Array, rest: jax.Array) -> jax.Array:
        index = jax.lax.broadcasted_iota(jnp.int32, rest.shape, 0)
        return jnp.where(index < count, first, rest)

    return jax.jit(join, out_shardings=rest.sharding)(first, rest)
