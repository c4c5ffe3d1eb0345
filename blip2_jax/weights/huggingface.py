"""Hugging Face folders: `config.json` and weights, of towers and of whole BLIP-2 models.

A folder is named by its path, or by `package:NAME` for the small towers that ship with blip2_jax.
A tower may also be taken out of a whole model's folder.
"""

import contextlib
import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from blip2_jax.data import language, tokenizers
from blip2_jax.models.blip2 import Blip2Config, LLMConfig
from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights import configs, files, images, published, tables, transfer
from blip2_jax.weights.files import Tensors, WeightsError
from blip2_jax.weights.positions import Resized
from blip2_jax.weights.rows import Table

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
        hint = files.foreign_folder(folder) or hint
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
    return _read_json(find(source) / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    files.check_pointer(path)
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}); download the folder again.") from error
    if not isinstance(document, dict):
        raise WeightsError(f"{path} is no JSON object; download the folder again.")
    return document


# -------------------------------------------------------------------------------------- towers


def llm_config(source: str, **overrides: Any) -> LLMConfig:
    """The language model's sizes, from its (or a whole BLIP-2's) `config.json`.

    A language model's own folder does not know of BLIP-2, whose rules hold then (LAVIS): an OPT's
    texts end by a newline, and a T5's tanh GELU is computed exactly.

    Args:
      source: see `find`.
      **overrides: fields to set whatever the file says; those that the family lacks (Llama has
        no dropout) are left out.
    """
    config = read_config(source)
    if config.get("model_type") in COMPOSITES:
        sizes = _with_ends(source, configs.parse_text(config, source))
    else:
        sizes = _with_ends(source, configs.parse(config, configs.LLMS, source))
        if sizes.family == "opt":
            sizes = dataclasses.replace(sizes, eos_token_ids=())
        if sizes.family == "t5" and sizes.activation == "gelu_new":
            sizes = dataclasses.replace(sizes, activation="gelu")
    names = {field.name for field in dataclasses.fields(sizes)}
    return dataclasses.replace(sizes, **{k: v for k, v in overrides.items() if k in names})


def _with_ends(source: str, sizes: LLMConfig) -> LLMConfig:
    """The same, with the end tokens of `generation_config.json` where it names any."""
    path = None if source in published.CONFIGS else find(source) / "generation_config.json"
    if path is None or not path.is_file():
        return sizes
    document = _read_json(path)
    if document.get("eos_token_id") is None:
        return sizes
    fields = configs.Fields(document, sizes.family, str(path))
    return dataclasses.replace(sizes, eos_token_ids=fields.tokens("eos_token_id"))


def vit_config(source: str, **overrides: Any) -> ViTConfig:
    """The image encoder's sizes, from its (or a whole model's) `config.json`; see `images`."""
    config = read_config(source)
    if config.get("model_type") in (*COMPOSITES, "clip"):
        kind = "clip_vision_model" if config["model_type"] == "clip" else "blip_2_vision_model"
        config = {"model_type": kind, **(config.get("vision_config") or {})}
    sizes = configs.parse(config, configs.VITS, source)
    if source not in published.CONFIGS or Path(source).exists():
        sizes = images.settings(find(source), sizes, config["model_type"], whole=False)
    return dataclasses.replace(sizes, **overrides)


def llm_table(sizes: LLMConfig) -> Table:
    """The name table of a language model with these sizes."""
    if sizes.family == "opt":
        return tables.opt(sizes.tied_head, sizes.bias)
    if sizes.family == "llama":
        return tables.llama(sizes.tied_head)
    return tables.t5(sizes.tied_head)


def tower_table(sizes: Any) -> Table:
    """The name table of a tower with these sizes."""
    if isinstance(sizes, ViTConfig):
        return tables.clip_vision() if configs.is_clip(sizes) else tables.eva()
    return llm_table(sizes)


def tower(source: str, sizes: Any) -> tuple[Table, Tensors]:
    """The name table of a tower, and its tensors under the table's names.

    The prefix of a tower's names (`model.`, `vision_model.`, none) depends on who saved it; it is
    found by the table's first name.
    """
    table, tensors = tower_table(sizes), files.open_folder(find(source))
    if read_config(source).get("model_type") in COMPOSITES:
        prefix = "vision_model." if isinstance(sizes, ViTConfig) else "language_model."
        inside = {n.removeprefix(prefix): n for n in tensors.shapes if n.startswith(prefix)}
        return table, files.Renamed(tensors, inside)
    return table, _fit(table, tensors)


def _fit(table: Table, tensors: Tensors) -> Tensors:
    """The tensors under the table's names, if only their common prefix differs."""
    first = table.rows[0].theirs
    head, _, rest = first.partition(".")
    # What the table's names begin with and the file's do not: nothing, or the first part.
    for missing, name in (("", first), (f"{head}.", rest)):
        match = min((n for n in tensors.shapes if n.endswith(name)), key=len, default=None)
        if match is not None and "." in name:
            prefix = match.removesuffix(name)
            names = {
                missing + n.removeprefix(prefix): n for n in tensors.shapes if n.startswith(prefix)
            }
            heads = {n: n for n in tensors.shapes if n.startswith("lm_head")}  # never prefixed
            return files.Renamed(tensors, names | heads)
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


def save(folder: Path, sizes: Any, params: Any, *, overwrite: bool = False) -> None:
    """Writes a tower as `config.json` and safetensors, in the parameters' dtype.

    See `files.writing` for `folder` and `overwrite`.
    """
    dtype = str(jax.tree.leaves(params)[0].dtype)
    with files.writing(folder, transfer.num_bytes(params), overwrite=overwrite) as draft:
        files.write_shards(draft, transfer.tensors_of(tower_table(sizes), params))
        _write_json(draft / "config.json", {**configs.write(sizes), "dtype": dtype})
        if isinstance(sizes, ViTConfig):
            images.write(draft, sizes)


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


# ------------------------------------------------------------------------------- whole models


def blip2_config(source: str) -> Blip2Config:
    """The sizes of a BLIP-2 or InstructBLIP folder."""
    config = configs.parse_blip2(read_config(source), source)
    vision = images.settings(find(source), config.vit, "blip_2_vision_model", whole=True)
    llm = config.llm and _with_ends(source, config.llm)
    return dataclasses.replace(config, vit=vision, llm=llm)


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
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers loads: `Blip2ForConditionalGeneration` and its siblings.

    The temperature and the ITG head of a stage-1 model, which transformers has no place for, go
    into a file beside it that transformers does not read and `blip2_parts` does.

    Args:
      folder, overwrite: see `files.writing`.
      config: the model's sizes.
      params: all its parameters.
      companions: a folder whose tokenizer and processor files go along.
      dtype: of the tensors; by default the parameters' own.
    """
    extra_keys = ("temp", "itg_head")
    main = {key: part for key, part in params.items() if key not in extra_keys}
    extra = {key: part for key, part in params.items() if key in extra_keys}
    with files.writing(folder, transfer.num_bytes(params, dtype), overwrite=overwrite) as draft:
        if companions is not None:
            files.copy_companions(companions, draft)
        has_processor = any(draft.glob("*processor_config.json"))
        images.write(draft, config.vit)
        tokenizer = None
        if config.llm is not None and any(draft.glob("tokenizer*")):
            tokenizer = tokenizers.load(str(draft))
            with contextlib.suppress(ValueError):  # a tokenizer without such a token
                llm = language.with_end(tokenizer, config.llm, "")  # explicit, where a rule gave it
                config = dataclasses.replace(config, llm=llm)
        if tokenizer is not None and not has_processor and not config.qformer_reads_prompt:
            _write_processor(draft, config, tokenizer)
        index = _image_token_index(config, companions, tokenizer)
        config, main = _with_row(config, main, index)
        document = configs.write_blip2(config, index)  # first: it says what transformers lacks
        document["dtype"] = str(np.dtype(dtype or main["query_tokens"].dtype))
        files.write_shards(draft, transfer.tensors_of(blip2_table(config), main, dtype))
        if extra:
            tensors = dict(transfer.tensors_of(tables.RETRIEVAL_EXTRAS, extra, dtype))
            save_file(tensors, draft / EXTRAS, metadata={"format": "pt"})
        _write_json(draft / "config.json", document)


def _image_token_index(config: Blip2Config, companions: Path | None, tokenizer: Any) -> int | None:
    """Id of the `<image>` placeholder; None where no language model has a row for it."""
    if companions is not None and (companions / "config.json").is_file():
        known = _read_json(companions / "config.json").get("image_token_index")
        if known is not None:
            return known
    if config.llm is None:
        return None
    if tokenizer is not None:
        known = tokenizer.get_vocab().get(language.IMAGE_TOKEN)
        if known is not None:
            return known
    # It is a row of the embeddings that is never read.
    published = {"opt": 50265, "t5": 32100, "llama": 32001}
    return min(published[config.llm.family], config.llm.vocab_size - 1)


def _write_processor(draft: Path, config: Blip2Config, tokenizer: Any) -> None:
    """The tokenizer with `<image>`, beside what `images.write` has written."""
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    kind = CLIPImageProcessorPil if config.vit.shortest_edge else BlipImageProcessorPil
    number = config.qformer.num_query_tokens
    processor = Blip2Processor(kind.from_pretrained(draft), tokenizer, num_query_tokens=number)
    processor.save_pretrained(draft)


def _with_row(
    config: Blip2Config, params: dict[str, Any], index: int | None
) -> tuple[Blip2Config, dict[str, Any]]:
    """Gives the language model a row for `<image>` where its vocabulary ends before it.

    New rows, up to a multiple of 64, are the mean of the others, as transformers makes them.
    """
    if config.llm is None or index is None or index < config.llm.vocab_size:
        return config, params
    vocab_size = -(-(index + 1) // 64) * 64

    def grown(x: Any, axis: int) -> np.ndarray:
        x = np.asarray(x)
        mean = x.mean(axis=axis, keepdims=True, dtype=np.float32).astype(x.dtype)
        return np.concatenate(
            [x, np.repeat(mean, vocab_size - x.shape[axis], axis=axis)], axis=axis
        )

    llm = {**params["llm"]}
    llm["embed_tokens"] = {"embedding": grown(llm["embed_tokens"]["embedding"], 0)}
    if "lm_head" in llm:
        llm["lm_head"] = {"kernel": grown(llm["lm_head"]["kernel"], 1)}
    sizes = dataclasses.replace(config.llm, vocab_size=vocab_size)
    return dataclasses.replace(config, llm=sizes), {**params, "llm": llm}
