"""Files of named tensors, read piece by piece: safetensors, and torch's `.bin` and `.pth`.

Nothing here knows what the tensors mean. A reader opens headers first, so that a damaged or
missing file is reported before anything is loaded; a tensor is copied out of its file only when it
is asked for, and only the slice that is asked for. Nothing is ever unpickled freely: torch's files
are read with `weights_only=True`.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from blip2_jax.runtime import outputs

log = logging.getLogger(__name__)


class WeightsError(ValueError):
    """A checkpoint that cannot be what it should be; the message names file, tensor and remedy."""


class Tensors(Protocol):
    """Named tensors in one or several files; shapes and dtypes are known without reading them.

    Attributes:
      source: where they are, for messages.
    """

    source: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""

    @property
    def dtypes(self) -> Mapping[str, np.dtype]:
        """Name -> dtype."""

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor, or a rectangular piece of it, in the file's own dtype."""


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


# Prefixes of wrapped modules: of torch.compile, FSDP and checkpointing at any depth; of DDP and
# PEFT around the whole model.
INNER = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER = ("module.", "base_model.model.")


def unwrapped(tensors: Tensors) -> Tensors:
    """The tensors under the names that they have in the bare model; says what was left out.

    Raises:
      WeightsError: two tensors get one name; low-rank adapters are not merged.
    """
    names = {name: INNER.sub("", name) for name in tensors.shapes}
    wrappers = {part for name in tensors.shapes for part in INNER.findall(name)}
    lora = next((name for name in names if ".lora_A." in name or ".base_layer." in name), None)
    if lora is not None:
        raise WeightsError(
            f"{tensors.source} holds low-rank adapters beside its weights ({lora}); merge them "
            "(peft: merge_and_unload()) and save the model again."
        )
    while outer := next((p for p in OUTER if names and all(map(_starts(p), names.values()))), None):
        names = {name: short.removeprefix(outer) for name, short in names.items()}
        wrappers.add(outer.rstrip("."))
    if not wrappers:
        return tensors
    short = {new: old for old, new in names.items()}
    if len(short) < len(names):
        names_of = ", ".join(sorted(wrappers))
        raise WeightsError(f"{tensors.source} holds tensors twice, with and without {names_of}.")
    log.warning("%s: read without %s in its names.", tensors.source, ", ".join(sorted(wrappers)))
    return Renamed(tensors, short)


def _starts(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


def check_pointer(path: Path) -> None:
    """Raises WeightsError for a Git LFS pointer, which stands for a file not downloaded."""
    if path.is_file() and path.stat().st_size < 1024:
        with path.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                raise WeightsError(
                    f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in "
                    f"{path.parent}, or download the file."
                )


def foreign_folder(folder: Path) -> str:
    """What a folder holds if it is not in transformers' form, and the remedy; "" if unknown."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text()).get("base_model_name_or_path") or "its model"
        except ValueError:
            base = "its model"
        return (
            f"It is a PEFT adapter of {base}: merge it into that (peft: merge_and_unload()), and "
            "save the result."
        )
    for pattern, meaning in FOREIGN_FOLDERS.items():
        if any(folder.glob(pattern)):
            return meaning
    inner = sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
    return f"It is a cache of the hub; the model is in {inner[-1]}." if inner else ""


FOREIGN_FOLDERS = {
    "model_index.json": "It is a pipeline of diffusers, which holds no BLIP-2.",
    "open_clip_config.json": "It is of open_clip; take the same model in transformers' form.",
    "modules.json": "It is of sentence-transformers, which holds no BLIP-2.",
    "*.gguf": "GGUF files are quantized; take the original weights.",
    "consolidated.*.pth": "It is in Meta's own form; convert it with transformers' script.",
    "zero_to_fp32.py": "It is a checkpoint of DeepSpeed; run its zero_to_fp32.py first.",
    "*.distcp": "It is a checkpoint of FSDP in pieces; consolidate it first.",
    "tf_model.h5": "It has weights of TensorFlow only; save it from PyTorch.",
    "flax_model.msgpack": "It has weights of transformers' Flax only; save it from PyTorch.",
    "*.safetensors": "It has weights but no config.json; download the folder again.",
    "*.bin": "It has weights but no config.json; download the folder again.",
}


class SafetensorsFiles:
    """Tensors of safetensors files.

    Args:
      files: tensor name -> file.
      source: the folder, for messages.

    Raises:
      WeightsError: a file is damaged, or does not hold a tensor that it should.
    """

    def __init__(self, files: Mapping[str, Path], source: str):
        self.source, self._files = source, files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for path in sorted(set(files.values())):
            with _open(path) as tensors:
                held = set(tensors.keys())
                for name in (name for name, file in files.items() if file == path):
                    if name not in held:
                        raise WeightsError(
                            f"{path} holds no tensor {name}, though its index says so; index and "
                            "shards are of different downloads. Download the folder again."
                        )
                    header = tensors.get_slice(name)
                    self.shapes[name] = tuple(header.get_shape())
                    self.dtypes[name] = _dtype(header.get_dtype(), name, path)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """See `Tensors.read`.

        Raises:
          WeightsError: the file is cut short or damaged there.
        """
        # Opened for each tensor: pages of a mapped file count as this process's memory until the
        # file is closed.
        with _open(self._files[name]) as tensors:
            try:
                return tensors.get_slice(name)[index] if index else tensors.get_tensor(name)
            except (SafetensorError, ValueError) as error:
                raise WeightsError(
                    f"Tensor {name} in {self._files[name]} cannot be read ({error}); download the "
                    "file again."
                ) from error


DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def _dtype(code: str, name: str, path: Path) -> np.dtype:
    if code not in DTYPES:
        raise WeightsError(
            f"Tensor {name} in {path} is of type {code}; known: {', '.join(DTYPES)}. Quantized "
            "checkpoints are not read; take the original."
        )
    return np.dtype(DTYPES[code])


def _open(path: Path) -> Any:
    check_pointer(path)
    try:
        return safe_open(path, "np")
    except Exception as error:  # the library's own error names no file
        raise WeightsError(f"{path} is damaged ({error}); download it again.") from error


class TorchFiles:
    """Tensors of torch's `.bin` or `.pth` files; a dict under the key "model" is unwrapped."""

    def __init__(self, paths: Iterable[Path], source: str):
        self.source = source
        self._tensors: dict[str, Any] = {}
        for path in paths:
            self._tensors |= _load_torch(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {
            name: _torch_dtype(str(tensor.dtype).removeprefix("torch."), name, source)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """See `Tensors.read`."""
        import torch

        tensor = self._tensors[name].detach()
        tensor = (tensor[index] if index else tensor).contiguous()
        if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _torch_dtype(code: str, name: str, source: str) -> np.dtype:
    known = {np.dtype(kind).name: np.dtype(kind) for kind in (*DTYPES.values(), np.int16)}
    if code not in known:
        raise WeightsError(
            f"Tensor {name} in {source} is of type {code}; known: {', '.join(known)}. Quantized "
            "checkpoints are not read; take the original."
        )
    return known[code]


def to_torch(array: np.ndarray) -> Any:
    """An array as a torch tensor, bit for bit."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def import_torch(path: Path) -> Any:
    """PyTorch, which only its own files need; WeightsError if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path} is a torch file, which needs torch: pip install 'blip2_jax[convert]'."
        ) from error
    return torch


def _load_torch(path: Path) -> dict[str, Any]:
    torch = import_torch(path)
    check_pointer(path)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as plain tensors ({str(error).splitlines()[0]}). It is damaged "
            "(download it again), or holds Python objects, which are not loaded for safety."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def open_folder(folder: Path) -> Tensors:
    """The tensors of a Hugging Face folder: safetensors before `.bin`, single or with an index."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            files = {name: folder / file for name, file in _weight_map(index).items()}
            missing = sorted({str(file) for file in files.values() if not file.is_file()})
            if missing:
                raise WeightsError(f"{index} names files that are not there: {', '.join(missing)}.")
        elif single.is_file():
            files = {}
            if suffix == "safetensors":
                with _open(single) as tensors:
                    files = dict.fromkeys(tensors.keys(), single)
        else:
            continue
        if suffix == "safetensors":
            return unwrapped(SafetensorsFiles(files, str(folder)))
        return unwrapped(TorchFiles(sorted(set(files.values())) or [single], str(folder)))
    raise WeightsError(
        f"Neither model.safetensors nor pytorch_model.bin, whole or with an index, in {folder}. "
        + (foreign_folder(folder) or "Download the folder again.")
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise WeightsError(f"{index} is no index of shards; download it again.") from error


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises WeightsError if the disk has less free space than is to be written."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise WeightsError(
            f"{folder} needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free. "
            "Make room, name another place, or write a smaller --dtype."
        )


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = 4 * 10**9
) -> None:
    """Writes safetensors, with an index if there are several; holds one shard in memory.

    Args:
      folder: exists and is empty of weights; the caller renames it into place when all is done.
      tensors: names with arrays, made as they are asked for.
      shard_bytes: a new file begins when the next tensor would make the last one larger.
    """
    shard: dict[str, np.ndarray] = {}
    held: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        held.append(sorted(shard))
        path = folder / f"shard-{len(held):05d}"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes it the owner's alone; a team reads it too
        shard.clear()

    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(held) == 1:
        (folder / "shard-00001").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(held, 1):
        file = f"model-{number:05d}-of-{len(held):05d}.safetensors"
        (folder / f"shard-{number:05d}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def open_safetensors(path: Path) -> SafetensorsFiles:
    """The tensors of one safetensors file."""
    with _open(path) as tensors:
        return SafetensorsFiles(dict.fromkeys(tensors.keys(), path), str(path))


@contextlib.contextmanager
def writing(folder: Path, num_bytes: int, *, overwrite: bool = False) -> Iterator[Path]:
    """A draft folder that is renamed to `folder` at the end, and removed after an error.

    Args:
      folder: what is to be written; see `outputs.check_folder`.
      num_bytes: space that it takes, checked to be there.
      overwrite: whether what was written here before may be replaced.

    Raises:
      WeightsError: there is no room, or the folder holds what was not written here.
    """
    check_space(folder, num_bytes)
    try:
        with outputs.replacing_folder(folder, overwrite=overwrite) as draft:
            yield draft
    except outputs.Taken as error:
        raise WeightsError(str(error)) from error
    except OSError as error:
        raise WeightsError(f"{folder} could not be written: {error}.") from error


# Files that belong to a model's texts and images rather than to its weights.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "sentencepiece*", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "chat_template*", "qformer_tokenizer",
)  # fmt: skip


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies tokenizer and processor files; returns their names."""
    paths = sorted({path for pattern in COMPANIONS for path in source.glob(pattern)})
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copy(path, target / path.name)
    return [path.name for path in paths]
