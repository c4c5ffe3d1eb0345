"""Which source of records a config, or a path, names; `source` defines what a source is."""

from collections.abc import Sequence
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from blip2_jax.data import files, folders, lists, tars
from blip2_jax.data.mixtures import Mismatched, Mixture
from blip2_jax.data.prepared import TfdsSource, is_prepared
from blip2_jax.data.source import Source

# Sources that are opened elsewhere, by functions (name, config, training) -> source.
OTHERS = dict.fromkeys(("stories", "easy_stories"), "blip2_jax.digits.stories:open_source")
# Of a mixture's part; `randaugment` is read by `make_example`.
PART_KEYS = ("source", "dir", "images", "form", "columns", "split", "weight", "randaugment")


def make_source(config: ConfigDict, split: str) -> Source:
    """The config's records of a split: one source, or a mixture.

    Raises:
      ValueError: a folder and a mixture are both given, there is no such source, nothing that can
        be read, or a key of a mixture that is not known.
    """
    data = config.data
    training = split == data.split
    if not data.mixture:
        return _source(config, data, split, training)
    if data.dir:
        raise ValueError(
            f"config.data.dir is {data.dir!r}, and the recipe has a mixture of "
            f"{', '.join(data.mixture)}. Add --config.data.mixture={{}} to train on the former "
            "alone, or leave config.data.dir empty for the mixture."
        )
    parts = {}
    for name, part in data.mixture.items():
        unknown = set(part) - set(PART_KEYS)
        if unknown:
            raise ValueError(f"config.data.mixture.{name} has no key {sorted(unknown)[0]!r}.")
        own_keys = ("source", "images", "form", "columns", "index_dir")
        whole = {**{key: data[key] for key in own_keys}, **part}
        # A part may call its training split something else ("train2017").
        own = part.get("split", split) if training else split
        parts[name] = _source(config, SimpleNamespace(**whole), own, training)
    weights = {name: part.get("weight", 1.0) for name, part in data.mixture.items()}
    return Mixture(parts, data.mixture_by, weights)


def _source(
    config: ConfigDict, data: ConfigDict | SimpleNamespace, split: str, training: bool
) -> Source:
    if data.source in OTHERS:
        other: Source = resolve_name(OTHERS[data.source])(data.source, config, training)
        return other
    source = open_source(data, split)
    if data.source == "files" and not training and "{split}" not in data.dir:
        if not source.by_split:
            raise ValueError(
                f"config.data.dir {data.dir!r} is the same for {config.data.split!r} and "
                f"{split!r}. Write {{split}} where the two differ, or set --config.eval.every=0."
            )
    mismatched = config.data.mismatched if training else 0.0
    return Mismatched(source, mismatched) if mismatched else source


def open_source(data: Any, split: str) -> Source:
    """The records that a config's section names by `source`, `dir`, `images`, `form`, `columns`
    and `index_dir`.

    Raises:
      ValueError: there is no such source, or nothing that can be read.
    """
    if data.source == "tfds":
        return TfdsSource(data.dir, split)
    if data.source == "files":
        return open_files(
            data.dir,
            images=data.images,
            split=split,
            form=data.form,
            columns=data.columns,
            index_folder=data.index_dir,
        )
    from blip2_jax.data import datasets

    if data.source in datasets.NAMES:
        return datasets.open_dataset(
            data.source, data.dir, split, data.images, form=data.form, columns=data.columns
        )
    known = ", ".join(("tfds", "files", *OTHERS, *datasets.NAMES))
    raise ValueError(f"config.data.source is {data.source!r}; known: {known}.")


def open_files(
    path: str | Sequence[str],
    *,
    images: str = "",
    split: str = "",
    form: str = "image",
    columns: str = "",
    index_folder: str = "",
) -> Source:
    """The source for what a path holds: a prepared folder, tars, lists, or images beside texts.

    Args:
      path: a file, folder, glob or braces (see `files.expand`), or several; `{split}` in it
        stands for `split`.
      images: folder of the images that lists name; "": the list's own.
      split: of a prepared folder, of a folder with a list a split, or of a list that holds several.
      form: of lists: a record an "image" or a "caption".
      columns: of lists: which column holds what; see `columns.Columns`.
      index_folder: where indexes of tars are kept; see `tars.TarSource`.

    Raises:
      ValueError: nothing there that can be read.
    """
    paths = [path] if isinstance(path, str) else list(path)
    paths = [files.with_split(p, split) for p in paths if p]
    if not paths:
        raise ValueError("No path of data is given.")
    if len(paths) == 1 and is_prepared(paths[0]):
        return TfdsSource(paths[0], split)
    parts = [folders.contents(p, split, tars.NOTE) for p in paths]
    # An archive that is gone is known by its index (see `tars.ensure_index`).
    archives = {path.removesuffix(tars.NOTE) for part in parts for path in part.archives}
    if archives:  # img2dataset leaves .parquet and .json beside them, which say the same
        return tars.TarSource(sorted(archives), index_folder=index_folder)
    options: dict[str, Any] = {"split": split, "form": form, "columns": columns}
    beside = [folder for part in parts for folder in part.pairs]
    if beside:
        if len(parts) > 1:
            raise ValueError(f"{beside[0]} holds images beside texts; give that folder alone.")
        return lists.ListSource(folders.pairs(beside[0]), beside[0], **options)
    source = lists.ListSource([path for part in parts for path in part.lists], images, **options)
    source.by_split |= any(part.by_split for part in parts)
    return source
