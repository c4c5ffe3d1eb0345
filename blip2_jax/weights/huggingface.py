"""Hugging Face folders: `config.json` and weights, of towers and of whole BLIP-2 models.

A folder is named by its path, or by `package:NAME` for the small towers that ship with blip2_jax.
A tower may also be taken out of a whole model's folder.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from blip2_jax.models.blip2 import Blip2Config, LLMConfig
from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights import configs, files, published, tables, transfer
from blip2_jax.weights.files import Tensors, WeightsError
from blip2_jax.weights.positions import Resized
from blip2_jax.weights.tables import Table

PACKAGE = "package:"
EXTRAS = "stage1_heads.safetensors"  # what `Blip2ForImageTextRetrieval` has no place for
COMPOSITES = ("blip-2", "instructblip")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find(source: str) -> Path:
    """The folder behind a source, with its `config.json` checked to be there."""
    if source.startswith(PACKAGE):
        assets = Path(str(resources.files("blip2_jax") / "assets"))
        folder = assets / source.removeprefix(PACKAGE)
        known = sorted(p.name for p in assets.iterdir() if p.is_dir()) if assets.is_dir() else []
        hint = f"The package ships: {', '.join(known) or 'none'}."
    else:
        folder, hint = Path(source), "Give a local folder, or a name on the Hugging Face hub."
        if not folder.exists() and HUB_NAME.fullmatch(source):
            folder = _from_hub(source)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"No config.json in {folder} (from {source!r}). {hint}")
    return folder


def _from_hub(name: str) -> Path:
    """The local copy of a repository on the hub, fetched if need be; safetensors if it has them."""
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.bin"]))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{name} is no local folder, and could not be had from the Hugging Face hub: {error}"
        ) from error
    return folder


def read_config(source: str) -> dict[str, Any]:
    """The parsed `config.json` of a source; that of a published tower needs no folder."""
    if source in published.CONFIGS and not Path(source).exists():
        return dict(published.CONFIGS[source])
    path = find(source) / "config.json"
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is not JSON ({error}); download the folder again.") from error


# -------------------------------------------------------------------------------------- towers


def llm_config(source: str, **overrides: Any) -> LLMConfig:
    """The language model's sizes, from its (or a whole model's) `config.json`."""
    config = read_config(source)
    if config.get("model_type") in COMPOSITES:
        config = config.get("text_config") or {}
    return configs.parse(config, configs.LLMS, source, **overrides)


def vit_config(source: str, **overrides: Any) -> ViTConfig:
    """The image encoder's sizes, from its (or a whole model's) `config.json`."""
    config = read_config(source)
    if config.get("model_type") in (*COMPOSITES, "clip"):
        kind = "clip_vision_model" if config["model_type"] == "clip" else "blip_2_vision_model"
        config = {**(config.get("vision_config") or {}), "model_type": kind}
    return configs.parse(config, configs.VITS, source, **overrides)


def llm_table(sizes: LLMConfig) -> Table:
    """The name table of a language model with these sizes."""
    if isinstance(sizes, OPTConfig):
        return tables.opt()
    if isinstance(sizes, LlamaConfig):
        return tables.llama(sizes.tied_head)
    return tables.t5(sizes.tied_head)


def tower_table(sizes: Any) -> Table:
    """The name table of a tower with these sizes."""
    if isinstance(sizes, ViTConfig):
        return tables.clip_vision() if configs.is_clip(sizes) else tables.eva()
    return llm_table(sizes)


class Renamed:
    """Tensors under other names; those without a new name are hidden.

    Args:
      tensors: the file.
      names: new name -> name in the file.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self._tensors, self._names = tensors, names
        self.source = tensors.source
        self.shapes = {new: tensors.shapes[old] for new, old in names.items()}
        self.dtypes = {new: tensors.dtypes[old] for new, old in names.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """See `files.Tensors.read`; `name` is the new one."""
        return self._tensors.read(self._names[name], index)


def tower(source: str, sizes: Any) -> tuple[Table, Tensors]:
    """The name table of a tower, and its tensors under the table's names.

    Who saved a tower decides what stands before its names (`model.`, `vision_model.`, nothing);
    the table's first name tells, wherever it is found.
    """
    table, tensors = tower_table(sizes), files.open_folder(find(source))
    if read_config(source).get("model_type") in COMPOSITES:
        prefix = "vision_model." if isinstance(sizes, ViTConfig) else "language_model."
        inside = {n.removeprefix(prefix): n for n in tensors.shapes if n.startswith(prefix)}
        # The norm that closes the encoder is `ln_vision`, which is not a part of it here.
        inside = {new: old for new, old in inside.items() if "post_layernorm" not in new}
        return table, Renamed(tensors, inside)
    return table, _fit(table, tensors)


def _fit(table: Table, tensors: Tensors) -> Tensors:
    """The tensors under the table's names, if only what stands before all of them differs."""
    first = table.rows[0].theirs
    head, _, rest = first.partition(".")
    # What the table has before its names, and the file has not: nothing, or the first word.
    for missing, name in (("", first), (f"{head}.", rest)):
        found = min((n for n in tensors.shapes if n.endswith(name)), key=len, default=None)
        if found is not None and "." in name:
            prefix = found.removesuffix(name)
            names = {
                missing + n.removeprefix(prefix): n for n in tensors.shapes if n.startswith(prefix)
            }
            heads = {n: n for n in tensors.shapes if n.startswith("lm_head")}  # never prefixed
            return Renamed(tensors, names | heads)
    return tensors  # nothing fits; `transfer.plan` says what is missing


def load(source: str, sizes: Any, abstract: Any, *, progress: str = "") -> Any:
    """Reads a tower into the structure, dtypes and shardings of `abstract`.

    Args:
      source: see `find`.
      sizes: the tower's config, whose type chooses the name table.
      abstract: nested dict of `jax.ShapeDtypeStruct`, with a sharding each or None.
      progress: title of a progress bar ("": none).

    Raises:
      WeightsError: all missing tensors and wrong shapes, reported together.
    """
    table, tensors = tower(source, sizes)
    if isinstance(sizes, ViTConfig):
        tensors = Resized(tensors, sizes)
    return transfer.load(table, abstract, tensors, progress=progress)


def save(folder: Path, sizes: Any, params: Any) -> None:
    """Writes a tower as `config.json` and safetensors, in the parameters' dtype."""
    dtype = str(jax.tree.leaves(params)[0].dtype)
    with files.writing(folder, transfer.num_bytes(params)) as draft:
        files.write_shards(draft, transfer.tensors_of(tower_table(sizes), params))
        _write_json(draft / "config.json", {**configs.write(sizes), "dtype": dtype})


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


# ------------------------------------------------------------------------------- whole models


def blip2_config(source: str) -> Blip2Config:
    """The sizes of a BLIP-2 or InstructBLIP folder."""
    return configs.parse_blip2(read_config(source), source)


def blip2_table(config: Blip2Config) -> Table:
    """The name table of the transformers class that holds a model of this form."""
    frequency = config.qformer.cross_attention_frequency
    if config.llm is None:
        return tables.retrieval_hf(frequency)
    compose = tables.instructblip_hf if config.qformer_reads_prompt else tables.blip2_hf
    return compose(llm_table(config.llm), frequency)


def blip2_parts(source: str, config: Blip2Config) -> list[tuple[Table, Tensors]]:
    """The tables and tensors that a BLIP-2 folder holds; a second pair for the extra heads."""
    folder = find(source)
    tensors = Resized(files.open_folder(folder), config.vit)
    parts: list[tuple[Table, Tensors]] = [(blip2_table(config), tensors)]
    if config.llm is None and (folder / EXTRAS).is_file():
        parts.append((tables.RETRIEVAL_EXTRAS, files.open_safetensors(folder / EXTRAS)))
    return parts


def save_blip2(
    folder: Path,
    config: Blip2Config,
    params: Any,
    *,
    companions: Path | None = None,
    dtype: Any = None,
) -> None:
    """Writes a folder that transformers loads: `Blip2ForConditionalGeneration` and its siblings.

    The temperature and the ITG head of a stage-1 model, which transformers has no place for, go
    into a file beside it that transformers does not read and `blip2_parts` does.

    Args:
      folder: made, or refused if it holds something.
      config: the model's sizes.
      params: all its parameters.
      companions: a folder whose tokenizer and processor files go along.
      dtype: of the tensors; by default the parameters' own.
    """
    extra_keys = ("temp", "itg_head")
    main = {key: part for key, part in params.items() if key not in extra_keys}
    extra = {key: part for key, part in params.items() if key in extra_keys}
    with files.writing(folder, transfer.num_bytes(params, dtype)) as draft:
        if companions is not None:
            files.copy_companions(companions, draft)
        index = _image_token_index(config, companions, draft)
        config, main = _with_row(config, main, index)
        document = configs.write_blip2(config, index)  # first: it says what transformers lacks
        document["dtype"] = str(np.dtype(dtype or main["query_tokens"].dtype))
        files.write_shards(draft, transfer.tensors_of(blip2_table(config), main, dtype))
        if extra:
            tensors = dict(transfer.tensors_of(tables.RETRIEVAL_EXTRAS, extra, dtype))
            save_file(tensors, draft / EXTRAS, metadata={"format": "pt"})
        _write_json(draft / "config.json", document)


def _image_token_index(config: Blip2Config, companions: Path | None, draft: Path) -> int | None:
    """Id of the `<image>` placeholder, and a processor that writes it where there was none."""
    if companions is not None and (companions / "config.json").is_file():
        known = json.loads((companions / "config.json").read_text()).get("image_token_index")
        if known is not None:
            return known
    if config.llm is None:
        return None
    if any(draft.glob("tokenizer*")):
        from transformers import AutoTokenizer  # seconds of import

        tokenizer = AutoTokenizer.from_pretrained(draft)
        if not any(draft.glob("*processor_config.json")) and not config.qformer_reads_prompt:
            _write_processor(draft, config, tokenizer)
        known = tokenizer.get_vocab().get("<image>")
        if known is not None:
            return known
    # It is a row of the embeddings that is never read.
    published = {"OPTConfig": 50265, "T5Config": 32100, "LlamaConfig": 32001}
    return min(published[type(config.llm).__name__], config.llm.vocab_size - 1)


def _write_processor(draft: Path, config: Blip2Config, tokenizer: Any) -> None:
    """Resizing and normalization as published, and the tokenizer with `<image>`."""
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    side = config.vit.image_size
    images = BlipImageProcessorPil(size={"height": side, "width": side})
    number = config.qformer.num_query_tokens
    Blip2Processor(images, tokenizer, num_query_tokens=number).save_pretrained(draft)


def _with_row(
    config: Blip2Config, params: dict[str, Any], index: int | None
) -> tuple[Blip2Config, dict[str, Any]]:
    """Gives the language model a row for `<image>` where its vocabulary ends before it.

    New rows, up to a multiple of 64, are the mean of the others, as transformers makes them.
    """
    if config.llm is None or index is None or index < config.llm.vocab_size:
        return config, params
    rows = -(-(index + 1) // 64) * 64

    def grown(x: Any, axis: int) -> np.ndarray:
        x = np.asarray(x)
        mean = x.mean(axis=axis, keepdims=True, dtype=np.float32).astype(x.dtype)
        return np.concatenate([x, np.repeat(mean, rows - x.shape[axis], axis=axis)], axis=axis)

    llm = {**params["llm"]}
    llm["embed_tokens"] = {"embedding": grown(llm["embed_tokens"]["embedding"], 0)}
    if "lm_head" in llm:
        llm["lm_head"] = {"kernel": grown(llm["lm_head"]["kernel"], 1)}
    sizes = dataclasses.replace(config.llm, vocab_size=rows)
    return dataclasses.replace(config, llm=sizes), {**params, "llm": llm}
