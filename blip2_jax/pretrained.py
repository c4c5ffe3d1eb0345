"""From whatever a user names to a model that answers: `blip2_jax.load`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from blip2_jax.data import tokenizers
from blip2_jax.data.language import check_vocabulary
from blip2_jax.inference.pipeline import Blip2, check_batch_size
from blip2_jax.models.blip2 import AXES
from blip2_jax.runtime import distributed, dtypes, run_dir
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.rules import RULES
from blip2_jax.weights import checkpoint
from blip2_jax.weights.checkpoint import Checkpoint

BERT = "bert-base-uncased"  # whose vocabulary every published Q-Former has, and [DEC]


def load(
    source: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    vit: str = "",
    llm: str = "",
    qformer_tokenizer: str = "",
    llm_tokenizer: str = "",
    batch_size: int = 32,
) -> Blip2:
    """Loads a BLIP-2 or InstructBLIP model.

    Args:
      source: a Hugging Face folder or hub name, a LAVIS `.pth`, a native folder, the workdir of a
        run, finished or not, which stands for its newest checkpoint, or one of its checkpoints
        (WORKDIR/checkpoints/STEP).
      dtype: what parameters are kept in and computed with, by name ("bfloat16", "fp16", ...) or as
        a type of NumPy, JAX or PyTorch; None: as stored.
      mesh: a mesh, or sizes of one as in a config ({"data": 1, "fsdp": -1, "tensor": 1}), over
        which parameters and batches are spread; None: the first device or, of a run, its own mesh.
      vit, llm: the towers' own folders or files, where the source does not hold them (LAVIS) or
        they are no longer where a run found them.
      qformer_tokenizer, llm_tokenizer: folders or hub names, where the source has none.
      batch_size: images, texts or pairs that are computed at once, at most.

    Raises:
      ValueError: everything that does not fit, before anything is read.
    """
    if dtype is not None:
        dtype = dtypes.parse(dtype)
    batch_size = check_batch_size(batch_size)
    distributed.setup_compilation_cache()
    source = str(source)
    if isinstance(mesh, Mapping):
        mesh = meshes.make_mesh(mesh)
    run = run_dir.find(source)
    if run is not None:
        from blip2_jax import recipe  # half a second of import, for runs only

        if run.step < run.steps:
            print(f"{run.folder}: step {run.step} of {run.steps}.", file=sys.stderr)
        return recipe.load_run(
            run.folder,  # not `source`: the run may be saving others meanwhile
            batch_size=batch_size,
            dtype=dtype,
            mesh=mesh,
            vit=vit,
            llm=llm,
            qformer_tokenizer=qformer_tokenizer,
            llm_tokenizer=llm_tokenizer,
        )
    found = checkpoint.open_checkpoint(source, vit=vit, llm=llm)
    texts = _tokenizers(found, llm, qformer_tokenizer, llm_tokenizer)
    params = found.load(_placed(found.abstract(), dtype, mesh), progress=f"reading {source}")
    return Blip2(
        found.config,
        params,
        dtype=dtype,
        mesh=mesh,
        batch_size=batch_size,
        source=source,
        **texts,
    )


def _placed(abstract: Any, dtype: Any, mesh: Mesh | None) -> Any:
    """The parameters in their dtype, on their devices."""
    if dtype is not None:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    if mesh is None:
        return abstract
    places = meshes.shardings(abstract, AXES, RULES, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places
    )


def _tokenizers(found: Checkpoint, llm: str, qformer: str, language: str) -> dict[str, Any]:
    """The model's tokenizers: as named, or those beside the weights, or the published ones."""
    config, beside = found.config, found.companions
    has_own = beside is not None and any(beside.glob("tokenizer*"))
    chosen: dict[str, Any] = {}
    if config.llm is not None:
        own = language or llm or (str(beside) if has_own else "")
        if not own:
            raise ValueError(
                f"{found.source} has no tokenizer for its language model. Name the folder of one "
                "with llm_tokenizer=."
            )
        words = chosen["llm_tokenizer"] = tokenizers.load(own, found.llm_special_tokens)
        check_vocabulary(words, config.llm.vocab_size, "language model")
    if config.llm is None or config.qformer_reads_prompt:
        folder = beside / "qformer_tokenizer" if config.llm is not None and beside else beside
        if not qformer and folder is not None and any(folder.glob("tokenizer*")):
            qformer = str(folder)
        words = chosen["qformer_tokenizer"] = tokenizers.load(qformer or BERT)
        check_vocabulary(words, config.qformer.vocab_size, "Q-Former")
    return chosen
