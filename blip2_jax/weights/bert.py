"""What the Q-Former takes over from BERT at the start of stage 1 (paper, section 3.1)."""

from typing import Any

import jax
import jax.numpy as jnp

from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.runtime.mesh import nested
from blip2_jax.weights import huggingface, tables, transfer
from blip2_jax.weights.files import Renamed, Tensors, WeightsError, open_folder

WORDS = "word_embeddings/embedding"


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
    copies of the text ones (LAVIS `blip2_qformer.py`); cross-attention and the rows of words that
    BERT does not have ([DEC]) stay as they are. BERT's token types are dropped, not folded in.

    Args:
      qformer: the parameters of `models.qformer.QFormer` with its text branch; arrays whose
        shardings and dtypes are kept.
      config: its sizes.
      source: a folder with a BERT of the same sizes.

    Raises:
      WeightsError: what does not fit.
    """
    table = tables.bert_text(config.cross_attention_frequency)
    tensors = _modern_names(open_folder(huggingface.find(source)))
    leaves = transfer.leaves_of(qformer)
    taken = {path for row in table.rows for path in row.ours}
    if not taken <= leaves.keys():
        raise WeightsError("Only a Q-Former with its text branch (stage 1) starts from BERT.")
    abstract = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for p, x in leaves.items()
        if p in taken
    }
    known = tensors.shapes.get("embeddings.word_embeddings.weight", (0, 0))
    if known[0] > config.vocab_size:
        raise WeightsError(
            f"{source} knows {known[0]} words, config.model.qformer.vocab_size is "
            f"{config.vocab_size}; it must be at least as large, and one larger for [DEC]."
        )
    # Not sharded: fewer rows need not divide as all of them do.
    abstract[WORDS] = jax.ShapeDtypeStruct((known[0], config.hidden_size), leaves[WORDS].dtype)
    loaded = transfer.leaves_of(transfer.load(table, nested(abstract), tensors))
    words = jnp.concatenate([loaded[WORDS], jnp.asarray(leaves[WORDS])[known[0] :]])
    loaded[WORDS] = jax.device_put(words, leaves[WORDS].sharding)
    for path in list(loaded):
        if "/mlp_text/" in path:
            loaded[path.replace("/mlp_text/", "/mlp_query/")] = jnp.copy(loaded[path])
    return nested({path: loaded.get(path, leaf) for path, leaf in leaves.items()})
