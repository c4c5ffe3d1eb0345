"""A whole model on disk, in any of the formats: configs and headers first, arrays on request.

A model's parameters may stand in several files: a LAVIS file has no LLM and often no image
encoder, which then come from files of their own. Each part has its name table.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from blip2_jax.models.blip2 import LLMS, Blip2Config, make_model
from blip2_jax.models.llama import RopeConfig
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.vit import ViTConfig
from blip2_jax.runtime.checkpoint import (
    Checkpointer,
    restore_params,
    restore_params_into,
    saved_shapes,
)
from blip2_jax.runtime.mesh import nested
from blip2_jax.weights import files, huggingface, lavis, transfer
from blip2_jax.weights.files import Tensors, WeightsError
from blip2_jax.weights.rows import Table

NATIVE = "blip2_jax.json"  # sizes of the model in a native folder
ARRAYS = "checkpoints/0"  # its arrays


OPTIONAL = {"temp", "itg_head"}  # what a stage-1 model of transformers lacks


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
      source: as the user named it.
      config: the model's sizes.
      parts: name tables with the tensors they are for; none in a native folder.
      companions: folder with tokenizer and processor files, or None.
      llm_special_tokens: of the language model's tokenizer, where they are others than the
        companions' own.
    """

    source: str
    config: Blip2Config
    parts: tuple[tuple[Table, Tensors], ...]
    companions: Path | None
    llm_special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def abstract(self) -> dict[str, Any]:
        """Shapes of all parameters that the files hold, in the files' own dtypes.

        What only other formats hold (transformers has no temperature and no ITG head) is absent.
        """
        whole = transfer.leaves_of(abstract_params(self.config))
        if not self.parts:
            dtypes = _native_dtypes(Path(self.source))
            kept = {path: leaf for path, leaf in whole.items() if path in dtypes}
            return nested({p: jax.ShapeDtypeStruct(x.shape, dtypes[p]) for p, x in kept.items()})
        dtypes = {
            path: tensors.dtypes[row.theirs.format(i=0)]
            for table, tensors in self.parts
            for row in table.rows
            for path in row.ours
            if path and row.theirs.format(i=0) in tensors.shapes
        }
        held = {part for table, tensors in self.parts for part in _held(table, tensors)}
        missing = sorted({_top(path) for path in whole} - held - OPTIONAL)
        if missing:
            options = {"vit": "--vit", "llm": "--llm"}
            hints = [f"name its own with {options[m]}" for m in missing if m in options]
            raise WeightsError(
                f"{self.source} holds nothing of {', '.join(missing)}"
                + (f"; {', '.join(hints)}." if hints else "; it is incomplete.")
            )
        kept = {path: leaf for path, leaf in whole.items() if _top(path) in held}
        return nested(
            {p: jax.ShapeDtypeStruct(x.shape, dtypes.get(p, x.dtype)) for p, x in kept.items()}
        )

    def load_into(self, params: Any) -> tuple[Any, int, list[str]]:
        """Replaces those parameters that the files hold too; what they hold besides is not read.

        Args:
          params: nested dict of arrays, whose shapes, dtypes and shardings are kept.

        Returns:
          The parameters, the number of arrays taken, and the paths of those not found.

        Raises:
          WeightsError: nothing in common, or an array of another shape.
        """
        if not self.parts:
            return restore_params_into(Path(self.source) / ARRAYS, params)
        ours, theirs = transfer.leaves_of(params), transfer.leaves_of(self.abstract())
        common = {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for p, x in ours.items()
            if p in theirs
        }
        if not common:
            raise WeightsError(f"{self.source} holds none of {', '.join(params)}.")
        loaded = dict(ours)
        for table, tensors, share in self._shares(nested(common)):
            part = transfer.load(table, share, tensors, partial=True, progress="reading")
            loaded |= transfer.leaves_of(part)
        return nested(loaded), len(common), [p for p in ours if p not in common]

    def plans(self, abstract: Any) -> list[tuple[transfer.Plan, Any]]:
        """What goes where, part by part, with the share of `abstract` that each part fills."""
        return [
            (transfer.plan(table, share, tensors), share)
            for table, tensors, share in self._shares(abstract)
        ]

    def _shares(self, abstract: Any) -> Iterator[tuple[Table, Tensors, Any]]:
        leaves = transfer.leaves_of(abstract)
        for table, tensors in self.parts:
            held = _held(table, tensors)
            paths = {path for row in table.rows for path in row.ours if path}
            share = {p: leaf for p, leaf in leaves.items() if p in paths and _top(p) in held}
            yield table, tensors, nested(share)

    def load(self, abstract: Any, *, progress: str = "") -> Any:
        """Reads the parameters of `abstract`, in its dtypes and shardings.

        Raises:
          WeightsError: everything that does not fit, before anything is read.
        """
        if not self.parts:
            return restore_params(Path(self.source) / ARRAYS, _placed(abstract))
        self.plans(abstract)  # every part's problems before any part's reading
        loaded: dict[str, Any] = {}
        for table, tensors, share in self._shares(abstract):
            part = transfer.load(table, share, tensors, progress=progress)
            loaded |= transfer.leaves_of(part)
        return nested(loaded)


def _top(path: str) -> str:
    return path.split("/")[0]


def _held(table: Table, tensors: Tensors) -> set[str]:
    """The parts of the model (top-level names) that a file holds something of."""
    return {
        _top(path)
        for row in table.rows
        for path in row.ours
        if path and row.theirs.format(i=0) in tensors.shapes
    }


def _placed(abstract: Any) -> Any:
    """The same with a sharding everywhere, as restoring wants it."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default), abstract
    )


def abstract_params(config: Blip2Config) -> dict[str, Any]:
    """Shapes of all parameters of a model, float32."""
    module = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(module))


def is_native(source: str) -> bool:
    """Whether a source is a native folder."""
    return (Path(source) / NATIVE).is_file()


def is_checkpoint(source: str) -> bool:
    """Whether a source looks like something that `open_checkpoint` opens."""
    return lavis.is_file(source) or is_native(source) or (Path(source) / "config.json").is_file()


def open_checkpoint(source: str, *, vit: str = "", llm: str = "") -> Checkpoint:
    """Finds out what a source is, reading configs and headers only.

    Args:
      source: a Hugging Face folder, a LAVIS `.pth`, or a native folder.
      vit: the image encoder's folder or `.pth`, where the source does not hold it, or does not
        say how many heads it has (LAVIS's files do not; the published encoders have 16).
      llm: the language model's folder, where the source does not hold it.

    Raises:
      WeightsError: what it is not, or what it lacks.
    """
    if lavis.is_file(source):
        return _open_lavis(source, vit, llm)
    if is_native(source):
        config = config_from_json((Path(source) / NATIVE).read_text())
        return Checkpoint(source, config, (), Path(source))
    folder = huggingface.find(source)
    config = huggingface.blip2_config(source)
    parts = huggingface.blip2_parts(source, config)
    return Checkpoint(source, config, tuple(parts), folder)


def _open_lavis(source: str, vit: str, llm: str) -> Checkpoint:
    tensors = lavis.open_file(source)
    vit_sizes = None
    if vit:
        if lavis.is_file(vit):
            vit_sizes = lavis.vit_config(lavis.open_file(vit), prefix="")
        else:
            vit_sizes = huggingface.vit_config(vit)
    llm_sizes = huggingface.llm_config(llm) if llm else None
    config = lavis.blip2_config(tensors, llm_sizes, vit_sizes)
    parts = lavis.parts(tensors, config)
    if vit_sizes is not None and not lavis.has_vit(tensors):
        own = lavis.vit_part if lavis.is_file(vit) else huggingface.tower
        table, held = own(vit, vit_sizes)
        parts.append((table.inside("vit/"), held))
    if config.llm is not None:
        table, held = huggingface.tower(llm, config.llm)
        parts.append((table.inside("llm/"), held))
    companions = huggingface.find(llm) if llm else None
    special = lavis.LLAMA_TOKENS if config.llm is not None and config.llm.family == "llama" else {}
    return Checkpoint(source, config, tuple(parts), companions, special)


# ------------------------------------------------------------------------------------- native


def config_to_json(config: Blip2Config) -> str:
    """A model's sizes as a JSON document."""
    document = dataclasses.asdict(config)
    document["llm_type"] = config.llm and type(config.llm).__name__
    return json.dumps(document, indent=2) + "\n"


def config_from_json(text: str) -> Blip2Config:
    """Undoes `config_to_json`."""
    document = json.loads(text)
    kinds = {kind.__name__: kind for kind in LLMS}
    kind = document.pop("llm_type")
    llm = document.pop("llm")
    if llm and "rope" in llm:
        llm["rope"] = RopeConfig(**_tuples(llm["rope"]))
    return Blip2Config(
        **{
            **document,
            "vit": ViTConfig(**_tuples(document["vit"])),
            "qformer": QFormerConfig(**document["qformer"]),
            "llm": kinds[kind](**_tuples(llm)) if llm else None,
        }
    )


def _tuples(document: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}


def _native_dtypes(folder: Path) -> dict[str, Any]:
    shapes = saved_shapes(folder / ARRAYS)
    return {path.removeprefix("params/"): np.dtype(dtype) for path, (_, dtype) in shapes.items()}


def save_native(
    folder: Path,
    config: Blip2Config,
    params: Any,
    *,
    companions: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a native folder: sharded arrays (Orbax), sizes, tokenizer and processor files.

    See `files.writing` for `folder` and `overwrite`.
    """
    with files.writing(folder, transfer.num_bytes(params), overwrite=overwrite) as draft:
        with Checkpointer(draft / "checkpoints") as checkpointer:
            checkpointer.save(0, {"params": params}, {})
        (draft / NATIVE).write_text(config_to_json(config))
        if companions is not None:
            files.copy_companions(companions, draft)
