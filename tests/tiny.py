"""A BLIP-2 small enough for tests, through the same recipe code as the full-size one."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from blip2_jax import cli, recipe
from blip2_jax.data.batch_spec import check_batch, example_spec


def config(stage: str = "stage1", **changes) -> ConfigDict:
    """The default config with tiny sizes; `changes` by dotted key."""
    c = ConfigDict(cli.load_config("configs/default.py").as_configdict().to_dict())
    c.name, c.dtype, c.frozen_dtype, c.steps = f"tiny-{stage}", "float32", "float32", 20
    c.stage.name = stage
    if stage == "stage2":
        c.trainable = ("ln_vision", "query_tokens", "qformer", "language_projection")
    c.model.vit.update(
        dict(image_size=16, patch_size=8, hidden_size=24, num_layers=2, num_heads=2, mlp_dim=32)
    )
    c.model.qformer.update(
        dict(
            num_query_tokens=4, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32,
            vocab_size=40, bos_token_id=39, max_position_embeddings=12, dropout=0.0,
        )
    )  # fmt: skip
    c.model.llm.update(
        dict(
            vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, ffn_dim=32,
            max_position_embeddings=32,
        )
    )  # fmt: skip
    c.model.projection_dim = 8
    c.data.batch_size, c.data.text_length, c.data.llm_length = 8, 6, 6
    c.data.max_prompt_length = 6
    c.optim.update(dict(peak_lr=3e-3, warmup_start_lr=3e-4, warmup_steps=2))
    for key, value in changes.items():
        section, name = c, key
        while "." in name:
            head, name = name.split(".", 1)
            section = section[head]
        section[name] = value
    return c


def config_of_files(folder, stage: str = "stage1", **changes) -> ConfigDict:
    """A tiny run, with dropout, on data and towers in `folder`: data/, vit/ and llm/."""
    files = {
        "data.dir": str(folder / "data"),
        "data.qformer_tokenizer": "package:digits-bert",
        "data.llm_tokenizer": "package:digits-opt",
        "data.text_length": 28,
        "data.llm_length": 28,
        "data.threads": 2,
        "model.vit.source": str(folder / "vit"),
        "model.llm.source": str(folder / "llm"),
        "model.qformer.vocab_size": 190,
        "model.qformer.bos_token_id": 189,
        "model.qformer.max_position_embeddings": 32,
        "model.qformer.dropout": 0.1,
    }
    return config(stage, **files | changes)


def batch(c: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random images and texts with padding, as `data.batch_spec` has them."""
    rng = np.random.default_rng(seed)
    size, b, t = c.model.vit.image_size, c.data.batch_size, c.data.text_length
    mask = (np.arange(t) < rng.integers(2, t + 1, b)[:, None]).astype(np.int32)
    ids = (rng.integers(3, 39, (b, t)) * mask).astype(np.int32)
    arrays = {
        "image": rng.integers(0, 256, (b, size, size, 3)).astype(np.uint8),
        "image_id": np.arange(b, dtype=np.int32),
        "text_ids": ids,
        "text_mask": mask,
        "llm_ids": ids,
        "llm_mask": mask,
        "llm_labels": np.where(mask > 0, ids, -100).astype(np.int32),
    }
    spec = example_spec(c, size, getattr(recipe.model_config(c), "llm", None))
    made = {name: arrays[name] for name in spec}
    check_batch(made, spec)
    return made


def frozen(run: recipe.Recipe) -> dict:
    """Random towers, placed as the recipe places them."""

    def leaf(x, key):
        return jax.device_put(0.2 * jax.random.normal(key, x.shape), x.sharding).astype(x.dtype)

    leaves, tree = jax.tree.flatten(run.abstract_frozen)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return jax.tree.unflatten(tree, [leaf(x, k) for x, k in zip(leaves, keys, strict=True)])


def copy(tree):
    """A deep copy: train steps consume the state they are given."""
    return jax.tree.map(jnp.copy, tree)
