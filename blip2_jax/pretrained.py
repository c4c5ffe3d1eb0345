"""Loads models: from a run, a Hugging Face folder, a LAVIS file or a native folder.

`load` is `blip2_jax.load`. Nothing else makes a `Blip2`, but `from_run`, of a run in training.
`recipe` is imported by the functions that read runs: it takes half a second.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from blip2_jax import cli
from blip2_jax.data import tokenizers
from blip2_jax.data.language import check_vocabulary
from blip2_jax.inference.batching import check_batch_size
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.models.blip2 import AXES, Blip2Config
from blip2_jax.runtime import distributed, dtypes, run_dir
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.checkpoint import restore_params
from blip2_jax.runtime.rules import RULES
from blip2_jax.weights import checkpoint
from blip2_jax.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from blip2_jax.recipe import Recipe
    from blip2_jax.stages.step import Params

BERT = "bert-base-uncased"  # with [DEC], the vocabulary of every published Q-Former


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
    saved = run_dir.find(source)
    if saved is not None:
        if saved.step < saved.steps:
            print(f"{saved.folder}: step {saved.step} of {saved.steps}.", file=sys.stderr)
        folder = saved.folder  # not `source`: a running run saves newer checkpoints
        run, params = load_run(folder, mesh, {"vit": vit, "llm": llm})
        if not isinstance(run.model_config, Blip2Config):
            raise ValueError(
                f"{folder} trained a tower ({run.config.name}), which is no BLIP-2 by itself."
            )
        return _from_recipe(
            run,
            params,
            dtype=dtype,
            batch_size=batch_size,
            source=str(folder),
            qformer_tokenizer=qformer_tokenizer,
            llm_tokenizer=llm_tokenizer,
        )
    opened = checkpoint.open_checkpoint(source, vit=vit, llm=llm)
    chosen = _tokenizers(opened, llm, qformer_tokenizer, llm_tokenizer)
    params = opened.load(_placed(opened.abstract(), dtype, mesh), progress=f"reading {source}")
    return Blip2(
        opened.config,
        params,
        dtype=dtype,
        mesh=mesh,
        batch_size=batch_size,
        source=source,
        **chosen,
    )


def _placed(abstract: Any, dtype: Any, mesh: Mesh | None) -> Any:
    """The parameters in their dtype, on their devices."""
    if dtype is not None:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    if mesh is None:
        return abstract
    shardings = meshes.shardings(abstract, AXES, RULES, mesh)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def _tokenizers(opened: Checkpoint, llm: str, qformer: str, language: str) -> dict[str, Any]:
    """The model's tokenizers: as named, or those beside the weights, or the published ones."""
    config, beside = opened.config, opened.companions
    has_own = beside is not None and any(beside.glob("tokenizer*"))
    chosen: dict[str, Any] = {}
    if config.llm is not None:
        own = language or llm or (str(beside) if has_own else "")
        if not own:
            raise ValueError(
                f"{opened.source} has no tokenizer for its language model. Name the folder of one "
                "with llm_tokenizer=."
            )
        tokenizer = chosen["llm_tokenizer"] = tokenizers.load(own, opened.llm_special_tokens)
        check_vocabulary(tokenizer, config.llm.vocab_size, "language model")
    if config.llm is None or config.qformer_reads_prompt:
        folder = beside / "qformer_tokenizer" if config.llm is not None and beside else beside
        if not qformer and folder is not None and any(folder.glob("tokenizer*")):
            qformer = str(folder)
        tokenizer = chosen["qformer_tokenizer"] = tokenizers.load(qformer or BERT)
        check_vocabulary(tokenizer, config.qformer.vocab_size, "Q-Former")
    return chosen


# --------------------------------------------------------------------------------------- runs


def open_run(source: str | Path) -> run_dir.RunCheckpoint:
    """The checkpoint that `WORKDIR` or `WORKDIR/checkpoints/STEP` names.

    Raises:
      ValueError: there is none.
    """
    saved = run_dir.find(source)
    if saved is None:
        raise ValueError(
            f"{source} holds no run. Train one with blip2 train --workdir={source}, or name "
            "another workdir."
        )
    return saved


def load_trained(
    source: str | Path,
    mesh: Mesh | None = None,
    towers: Mapping[str, str] | None = None,
) -> tuple["Recipe", "Params"]:
    """The recipe of a run, and the parameters that it has trained so far.

    Args:
      source: the run's workdir or one of its checkpoints; see `run_dir.find`.
      mesh: see `recipe.build`.
      towers: where towers ("vit", "llm") lie now, if not where the run found them.

    Raises:
      ValueError: there is no such checkpoint, or it cannot be read.
    """
    from blip2_jax import recipe

    saved = open_run(source)
    config = ConfigDict(json.loads(json.dumps(saved.document["config"])))
    for name, folder in (towers or {}).items():
        if folder:
            config.model[name].source = folder
    run = recipe.build(cli.config_from_json(cli.config_to_json(config)), mesh)
    return run, restore_params(saved.folder, run.abstract_state["params"])


def load_run(
    source: str | Path, mesh: Mesh | None = None, towers: Mapping[str, str] | None = None
) -> tuple["Recipe", "Params"]:
    """The recipe of a run and all its parameters: as `load_trained`, with the frozen towers'.

    Raises:
      ValueError: as there; or a tower is no longer the one that the run was trained on.
    """
    saved = open_run(source)
    run, trained = load_trained(saved.folder, mesh, towers)
    frozen, fingerprints = run.load_frozen()
    expected = saved.document["fingerprints"]
    if fingerprints != expected:
        raise ValueError(
            f"{saved.folder} was trained on towers {expected}, here are {fingerprints}. "
            "Install the towers it was trained on, or name their folders (vit, llm)."
        )
    return run, run.merge_params(frozen, trained)


def from_run(run: "Recipe", params: "Params", frozen: "Params", *, batch_size: int = 32) -> Blip2:
    """The BLIP-2 model of a run that is being trained; leaves its parameters as they are."""
    params = copied_params(run, params, frozen)
    return _from_recipe(run, params, batch_size=batch_size, source=run.config.name)


def copied_params(run: "Recipe", params: "Params", frozen: "Params") -> "Params":
    """Trained and frozen parameters for a `Blip2`, with a copy of the LLM's, which it consumes."""
    merged = run.merge_params(frozen, params)
    if "llm" in merged:
        shardings = jax.tree.map(lambda x: x.sharding, merged["llm"])
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        merged["llm"] = copy(merged["llm"])
    return merged


def _from_recipe(
    run: "Recipe",
    params: "Params",
    *,
    dtype: Any = None,
    batch_size: int,
    source: str,
    qformer_tokenizer: str = "",
    llm_tokenizer: str = "",
) -> Blip2:
    from blip2_jax import recipe

    data, llm = run.config.data, run.config.model.llm
    of_qformer = tokenizers.load(qformer_tokenizer or data.qformer_tokenizer)
    llm_tokenizer = llm_tokenizer or data.llm_tokenizer or llm.source
    of_llm = None
    if llm_tokenizer:
        of_llm = tokenizers.load(llm_tokenizer, data.llm_special_tokens.to_dict())
    return Blip2(
        recipe.with_tokenizers(run.config, run.model_config, of_qformer, of_llm),
        params,
        dtype=dtypes.parse(run.config.dtype if dtype is None else dtype),
        mesh=run.mesh,
        qformer_tokenizer=of_qformer,
        llm_tokenizer=of_llm,
        batch_size=batch_size,
        source=source,
    )
