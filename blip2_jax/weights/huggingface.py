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

from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights import configs, tables
from blip2_jax.weights.configs import LLMConfig, WeightsError
from blip2_jax.weights.tables import KINDS, Row

PACKAGE = "package:"

TABLES = {
    OPTConfig: tables.opt_rows,
    LlamaConfig: tables.llama_rows,
    T5Config: tables.t5_rows,
    ViTConfig: tables.clip_vision_rows,
}


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


def llm_config(source: str, **overrides: Any) -> LLMConfig:
    """The language model's sizes, from its `config.json`; see `configs.parse`."""
    return configs.parse(read_config(source), configs.LLMS, source, **overrides)


def vit_config(source: str, **overrides: Any) -> ViTConfig:
    """The image encoder's sizes, from its `config.json`; see `configs.parse`."""
    return configs.parse(read_config(source), configs.VITS, source, **overrides)


def rows_of(sizes: Any) -> tuple[Row, ...]:
    """The name table of a tower with these sizes."""
    return TABLES[type(sizes)]()


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


def _full_name(prefix: str, row: Row, layer: int) -> str:
    """A tensor's name in a checkpoint."""
    name = row.theirs.format(i=layer)
    return name[1:] if name.startswith("/") else prefix + name


def _paths(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def load(source: str, sizes: Any, abstract: Any) -> Any:
    """Reads a tower into the structure, dtypes and shardings of `abstract`.

    Tensors that no row names (heads and final norms that BLIP-2 drops) and layers beyond the
    stack's depth (ViT's last block) are left out; a parameter that no tensor fills is an error.

    Args:
      source: see `find`.
      sizes: the tower's config, whose type chooses the name table.
      abstract: nested dict of `jax.ShapeDtypeStruct`, with a sharding each or None.

    Raises:
      WeightsError: all missing tensors and wrong shapes, reported together.
    """
    folder = find(source)
    files = _tensor_files(folder)
    rows = rows_of(sizes)
    prefix = _prefix(files, rows)
    by_path = {row.ours: row for row in rows}
    problems, loaded = [], {}
    for path, leaf in _paths(abstract).items():
        row = by_path.get(path)
        if row is None:
            problems.append(f"{path}: the name table has no row for it")
            continue
        stacked = "{i}" in row.theirs
        names = [_full_name(prefix, row, i) for i in range(leaf.shape[0] if stacked else 1)]
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


def save(folder: Path, sizes: Any, params: Any) -> None:
    """Writes a tower as `config.json` and `model.safetensors`, in the parameters' dtype."""
    tensors, leaves = {}, _paths(params)
    rows = [row for row in rows_of(sizes) if row.ours in leaves]
    prefix = configs.PREFIXES[type(sizes)]
    config = {**configs.write(sizes), "dtype": str(next(iter(leaves.values())).dtype)}
    for row in rows:
        leaf = np.asarray(leaves.pop(row.ours))
        layers = leaf if "{i}" in row.theirs else [leaf]
        for i, layer in enumerate(layers):
            name = _full_name(prefix, row, i)
            tensors[name] = jnp.asarray(KINDS[row.kind].save(layer, row.ndim))
    if leaves:
        raise WeightsError(f"The name table has no row for {', '.join(sorted(leaves))}.")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.partial"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # the library makes it the owner's alone; others of a team read it too
    temporary.rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
