"""Towers from and to Hugging Face folders: `config.json` and safetensors, nothing unpickled.

A folder is named by its path, or by `package:NAME` for the small towers that ship with blip2_jax.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights.tables import KINDS, Row, clip_vision_rows, opt_rows

PACKAGE = "package:"


class WeightsError(ValueError):
    """A checkpoint that cannot be what it should be; the message names file, tensor and remedy."""


def find(source: str) -> Path:
    """The folder behind a source, with its `config.json` checked to be there."""
    if source.startswith(PACKAGE):
        assets = Path(str(resources.files("blip2_jax") / "assets"))
        folder = assets / source.removeprefix(PACKAGE)
        known = sorted(p.name for p in assets.iterdir() if p.is_dir()) if assets.is_dir() else []
        hint = f"The package ships: {', '.join(known) or 'none'}."
    else:
        folder, hint = Path(source), "Give a local folder, as `huggingface-cli download` makes it."
    if not (folder / "config.json").is_file():
        raise WeightsError(f"No config.json in {folder} (from {source!r}). {hint}")
    return folder


def read_config(source: str) -> dict[str, Any]:
    """The parsed `config.json` of a source."""
    path = find(source) / "config.json"
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is not JSON ({error}); download the folder again.") from error


def llm_config(source: str, **overrides: Any) -> OPTConfig:
    """The language model's sizes, from its `config.json`."""
    config = read_config(source)
    if config.get("model_type") != "opt":
        raise WeightsError(f"{source}: model_type {config.get('model_type')!r}; known: opt.")
    return OPTConfig(
        **{
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "ffn_dim": config["ffn_dim"],
            "max_position_embeddings": config["max_position_embeddings"],
            "activation": config.get("activation_function", "relu"),
            "dropout": config.get("dropout", 0.1),
            **overrides,
        }
    )


def vit_config(source: str, **overrides: Any) -> ViTConfig:
    """The image encoder's sizes, from its `config.json`."""
    config = read_config(source)
    if config.get("model_type") != "clip_vision_model":
        raise WeightsError(
            f"{source}: model_type {config.get('model_type')!r}; known: clip_vision_model."
        )
    return ViTConfig(
        **{
            "image_size": config["image_size"],
            "patch_size": config["patch_size"],
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "mlp_dim": config["intermediate_size"],
            "activation": config["hidden_act"],
            "layer_norm_eps": config["layer_norm_eps"],
            "attention_bias": "qkvo",
            "patch_bias": False,
            "pre_norm": True,
            **overrides,
        }
    )


def config_of(sizes: OPTConfig | ViTConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads for a tower of these sizes.

    A ViT is written as a CLIP vision model, which it must be: without `patch_bias`, with
    `pre_norm`, and with biases of q, k and v.
    """
    if isinstance(sizes, OPTConfig):
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "word_embed_proj_dim": sizes.hidden_size,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
            "ffn_dim": sizes.ffn_dim,
            "max_position_embeddings": sizes.max_position_embeddings,
            "activation_function": sizes.activation,
            "dropout": sizes.dropout,
        }
    if sizes.patch_bias or not sizes.pre_norm or sorted(sizes.attention_bias) != sorted("qkvo"):
        raise WeightsError("Only a CLIP-like ViT can be written as clip_vision_model.")
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.mlp_dim,
        "hidden_act": sizes.activation,
        "layer_norm_eps": sizes.layer_norm_eps,
    }


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of a folder with one safetensors file or with shards and an index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        files = {name: folder / file for name, file in names.items()}
        missing = sorted({str(f) for f in files.values() if not f.is_file()})
        if missing:
            raise WeightsError(f"{index} names files that are not there: {', '.join(missing)}.")
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        raise WeightsError(f"No model.safetensors in {folder}; download the folder again.")
    with _open(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _open(path: Path):
    try:
        return safe_open(path, "flax")
    except Exception as error:  # the library's own error names no file
        raise WeightsError(f"{path} is damaged ({error}); download it again.") from error


def _prefix(files: dict[str, Path], rows: tuple[Row, ...]) -> str:
    """What this checkpoint puts before the table's names: it depends on who saved it."""
    first = rows[0].theirs
    return min((name[: -len(first)] for name in files if name.endswith(first)), key=len, default="")


def _paths(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def load(source: str, rows: tuple[Row, ...], abstract: Any) -> Any:
    """Reads a tower into the structure, dtypes and shardings of `abstract`.

    Tensors that no row names (heads and final norms that BLIP-2 drops) and layers beyond the
    stack's depth (ViT's last block) are left out; a parameter that no tensor fills is an error.

    Args:
      source: see `find`.
      rows: the family's name table.
      abstract: nested dict of `jax.ShapeDtypeStruct`, with a sharding each or None.

    Raises:
      WeightsError: all missing tensors and wrong shapes, reported together.
    """
    folder = find(source)
    files = _tensor_files(folder)
    prefix = _prefix(files, rows)
    by_path = {row.ours: row for row in rows}
    problems, loaded = [], {}
    for path, leaf in _paths(abstract).items():
        row = by_path.get(path)
        if row is None:
            problems.append(f"{path}: the name table has no row for it")
            continue
        stacked = "{i}" in row.theirs
        names = [prefix + row.theirs.format(i=i) for i in range(leaf.shape[0] if stacked else 1)]
        layers = []
        for name in names:
            if name not in files:
                problems.append(f"{path}: no tensor {name}")
                continue
            layers.append(_read(files[name], name, row, leaf.shape[stacked:], problems))
        if len(layers) == len(names) and all(x is not None for x in layers):
            array = np.stack(layers) if stacked else layers[0]
            loaded[path] = jax.device_put(array.astype(leaf.dtype), leaf.sharding)
    if problems:
        raise WeightsError(f"{folder} does not fit the model:\n  " + "\n  ".join(problems))
    return jax.tree_util.tree_map_with_path(
        lambda p, _: loaded[jax.tree_util.keystr(p, simple=True, separator="/")], abstract
    )


def _read(file: Path, name: str, row: Row, shape: tuple[int, ...], problems: list[str]):
    with _open(file) as tensors:
        array = np.asarray(tensors.get_tensor(name))
    if array.size != np.prod(shape, dtype=int):
        problems.append(f"{row.ours}: tensor {name} is {array.shape}, ours is {shape} a layer")
        return None
    return KINDS[row.kind].load(array, shape)


def save(
    folder: Path, rows: tuple[Row, ...], params: Any, config: dict[str, Any], *, prefix: str = ""
) -> None:
    """Writes a tower as `config.json` and `model.safetensors`, in the parameters' dtype."""
    tensors, leaves = {}, _paths(params)
    for row in rows:
        leaf = np.asarray(leaves.pop(row.ours))
        layers = leaf if "{i}" in row.theirs else [leaf]
        for i, layer in enumerate(layers):
            name = prefix + row.theirs.format(i=i)
            tensors[name] = jnp.asarray(KINDS[row.kind].save(layer, row.ndim))
    if leaves:
        raise WeightsError(f"The name table has no row for {', '.join(sorted(leaves))}.")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.partial"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


TABLES = {"vit": clip_vision_rows, "llm": opt_rows}
