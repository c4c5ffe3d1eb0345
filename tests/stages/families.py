"""One train step of each stage and each family of LLMs, on any mesh; also on several hosts.

As a program it runs on one host of several and writes what it found:
    python tests/stages/families.py FOLDER
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from blip2_jax import recipe
from blip2_jax.runtime import distributed
from blip2_jax.runtime import mesh as meshes
from tests import tiny

# config.json of a language model: sizes are all that is read of it here.
LLMS = {
    "opt": {"model_type": "opt", "ffn_dim": 32, "do_layer_norm_before": True},
    "llama": {"model_type": "llama", "intermediate_size": 32, "num_key_value_heads": 1},
    "t5": {
        "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
FAMILIES = ("stage1", *LLMS)
# Each axis alone and all together for stage 1, where rows travel between devices; of the language
# models what splits them. Compiling a step for eight devices takes 10 to 20 seconds.
ON_MESHES = (
    ("stage1", (8, 1, 1)), ("stage1", (1, 8, 1)), ("stage1", (2, 2, 2)), ("opt", (2, 2, 2)),
    ("opt", (4, 1, 2)), ("llama", (2, 2, 2)), ("t5", (2, 2, 2)),
)  # fmt: skip


def config(family: str, folder: Path) -> ConfigDict:
    """A tiny config with dropout; `folder` receives the language model's config.json."""
    c = tiny.config("stage1" if family == "stage1" else "stage2")
    c.model.qformer.dropout = 0.1
    if family != "stage1":
        sizes = SIZES if family != "t5" else {}
        workdir = folder / family
        workdir.mkdir(parents=True, exist_ok=True)
        both = {"vocab_size": 40, "max_position_embeddings": 32, "word_embed_proj_dim": 16}
        (workdir / "config.json").write_text(json.dumps({**both, **sizes, **LLMS[family]}))
        c.model.llm.source = str(workdir)
    return c


def step(c: ConfigDict, sizes: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The loss and all gradients of the compiled step, whole, on every host.

    Gradients are read where the optimizer keeps them: its first moment after one step.
    """
    c.mesh.update(dict(zip(meshes.AXES, sizes, strict=True)))
    devices = jax.devices()[: int(np.prod(sizes))]
    run = recipe.build(c, meshes.make_mesh(c.mesh, devices))
    key = jax.jit(lambda: jax.random.key(1), out_shardings=meshes.replicated(run.mesh))()
    start = jax.jit(lambda: jax.random.key(0), out_shardings=meshes.replicated(run.mesh))()
    size = c.data.batch_size
    examples = meshes.local_rows(run.mesh, size)
    batch = {name: x[examples] for name, x in tiny.batch(c).items()}
    batch = meshes.global_batch(batch, run.mesh, size)
    state, metrics = run.train_step(run.init_state(start), tiny.frozen(run), batch, key)
    (moments,) = (s.mu for s in jax.tree.leaves(state["opt_state"], is_leaf=_has_mu) if _has_mu(s))
    whole = jax.jit(lambda x: x, out_shardings=meshes.replicated(run.mesh))
    result = jax.device_get(whole({"loss": metrics["loss"], "grads": moments}))
    grads = {
        name: x / (1 - c.optim.betas[0]) for name, x in meshes.flatten_with_names(result["grads"])
    }
    return {"loss": result["loss"], **grads}


def _has_mu(x) -> bool:
    return hasattr(x, "mu")


def main(folder: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    distributed.initialize()
    for family in FAMILIES:
        result = step(config(family, folder / str(jax.process_index())), (2, 2, 2))
        if distributed.is_first_process():
            np.savez(folder / f"{family}.npz", **result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
