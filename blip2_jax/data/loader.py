"""Batches, as a pure function of the step.

    numbers -> shuffle, repeat -> mix -> record, randomness -> example -> this host's rows -> batch

The record and the randomness of an example come from its place in the global order, before a host
takes its rows, so row k of a step's global batch is the same for any number of hosts, threads and
worker processes, and after any restart. Which rows a host reads is not decided here: it follows
from the mesh (`runtime.mesh.local_rows`).

A record that cannot be read is replaced by another that can, the same one every time. What was
wrong with it travels with the batch; the hosts count together (`Batches.count_skipped`), and a
share of such records that is too large stops all of them.
"""

import collections
import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from blip2_jax.data import sources, transforms
from blip2_jax.data.examples import Example, ExampleOf, Record, make_example
from blip2_jax.data.faults import RecordError, Skipped
from blip2_jax.data.language import LanguageConfig

MAX_REPLACED = 100  # records in a row that may be unreadable
FAULTS = "_faults"  # uint8[B, FAULTS_SIZE], on the way from where an example is made: JSON
FAULTS_SIZE = 1024
GOLDEN = (math.sqrt(5) - 1) / 2

Batch = dict[str, np.ndarray]  # examples of one kind, [B, ...] each
Fault = tuple[int, str, str]  # record number, reason, place


class Batches:
    """An iterator of batches that closes its threads or processes when a `with` block ends.

    Args:
      dataset: the batches, with a note of what could not be read in each row.
      skipped: receives what could not be read, when `count_skipped` is called.

    Attributes:
      skipped: what could not be read, of all hosts.
      wait_seconds: time spent waiting for data.
    """

    def __init__(self, dataset: grain.IterDataset[Batch], skipped: Skipped):
        self.skipped = skipped
        self.wait_seconds = 0.0
        self._iterator = iter(dataset)
        self._started = False
        # At this process's end too: Python would tell workers by SIGTERM, and wait for them.
        self._close = Finalize(self, self._iterator.close, exitpriority=0)
        self._uncounted: list[Fault] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        with contextlib.nullcontext() if self._started else _signals_kept_from_children():
            batch = next(self._iterator)
        self._started = True
        self.wait_seconds += time.perf_counter() - started
        for note in batch.pop(FAULTS):
            if note[0]:
                self._uncounted += json.loads(note.tobytes().rstrip(b"\0"))
        return batch

    def count_skipped(self, gather: Callable[[Any], Sequence[Any]] = lambda x: [x]) -> Skipped:
        """Counts what could not be read since the last call, on all hosts.

        Args:
          gather: gives every host's list to every host, in one order; all hosts call at the same
            step. As it is: there is one host.

        Returns:
          The count, the same on every host.

        Raises:
          TooManySkipped: that is more than the bounded share; on every host.
        """
        uncounted, self._uncounted = self._uncounted, []
        for faults in gather(uncounted):
            for index, reason, where in faults:
                self.skipped.add(reason, where, index=index)
        self.skipped.check()
        return self.skipped

    def prefetch(self, put: Callable[[Batch], Any], count: int = 2) -> Iterator[Any]:
        """Batches on the device, `count` of them on their way while the one before is computed.

        Args:
          put: sends a batch off without waiting for it, as `jax.device_put` does.
          count: batches that are held.
        """
        held: collections.deque[Any] = collections.deque()
        for batch in self:
            held.append(put(batch))
            if len(held) >= count:
                yield held.popleft()
        yield from held

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()


class _Rows:
    """Some rows of every batch: a source for Grain.

    Args:
      examples: of all batches, in global order.
      rows: of each batch.
      batch_size: of the global batches.
    """

    def __init__(
        self, examples: grain.MapDataset[Example], rows: Sequence[int], batch_size: int
    ) -> None:
        self._examples, self._rows, self._batch_size = examples, list(rows), batch_size

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Example:
        step, place = divmod(int(index), len(self._rows))
        example: Any = self._examples[step * self._batch_size + self._rows[place]]
        return example


def rows_of_batches(
    examples: grain.MapDataset[Example], batch_size: int, rows: Sequence[int] | None = None
) -> grain.MapDataset[Batch]:
    """Batches of some rows of each global batch.

    Args:
      examples: in global order: those of one batch after those of another.
      batch_size: of the global batches; a last one that is not whole is left out.
      rows: which of them, from 0; None: all.
    """
    rows = range(batch_size) if rows is None else rows
    if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ValueError(f"A batch of {batch_size} has no rows {list(rows)}.")
    return grain.MapDataset.source(_Rows(examples, rows, batch_size)).batch(len(rows))


def train_batches(
    config: ConfigDict,
    image_size: int,
    *,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    source: Any = None,
    skipped: Skipped | None = None,
    resample: str = "bicubic",
    llm: LanguageConfig | None = None,
) -> Batches:
    """Rows of the global batches from `start_step` on, without end.

    Args:
      config: a recipe's config; `data` and `seed` decide.
      image_size: side of the images, from the model.
      start_step: number of batches that were seen before.
      rows: of each global batch, those to load (`runtime.mesh.local_rows`); None: all.
      source: what `make_source` gave for the config; None: it is asked.
      skipped: the count that goes on (`count_of`); None: a new one.
      resample, llm: see `make_example`.
    """
    source = make_source(config, config.data.split) if source is None else source
    skipped = count_of(source, config) if skipped is None else skipped
    read = Reader(source, make_example(config, image_size, train=True, resample=resample, llm=llm))
    examples = _order(source, config).random_map(read)
    batches = rows_of_batches(examples, config.data.batch_size, rows)
    return Batches(_start(batches.slice(slice(start_step, None)), config), skipped)


def eval_batch_size(config: ConfigDict, source: Any, multiple: int = 1) -> int:
    """`eval.batch_size`, rounded up to what the mesh divides; fewer where there are fewer records.

    Args:
      config: a recipe's config.
      source: the records of `data.eval_split`.
      multiple: into how many parts the mesh splits a batch.

    Raises:
      ValueError: there are too few records for one batch.
    """
    size = -(-config.eval.batch_size // multiple) * multiple
    size = min(size, len(source) // multiple * multiple)
    if size < 1:
        raise ValueError(
            f"config.eval.batch_size is {config.eval.batch_size}, the split "
            f"{config.data.eval_split!r} has {len(source)} records, and the mesh splits a batch "
            f"into {multiple} parts: not one batch divides over it. Give it {multiple} records or "
            "more, or set --config.eval.every=0."
        )
    return size


def eval_batches(
    config: ConfigDict,
    image_size: int,
    *,
    batch_size: int | None = None,
    rows: Sequence[int] | None = None,
    source: Any = None,
    resample: str = "bicubic",
    llm: LanguageConfig | None = None,
) -> Batches:
    """The first `eval.batches` whole batches of `eval_split` (0: all), in order, not augmented.

    Args:
      config: a recipe's config.
      image_size: side of the images, from the model.
      batch_size: of the global batches; None: `eval_batch_size` says.
      rows: of each global batch, those to load; None: all.
      source: what `make_source` gave for `eval_split`; None: it is asked.
      resample, llm: see `make_example`.
    """
    source = make_source(config, config.data.eval_split) if source is None else source
    size = batch_size or eval_batch_size(config, source)
    count = len(source) // size
    count = min(count, config.eval.batches) or count
    read = Reader(source, make_example(config, image_size, train=False, resample=resample, llm=llm))
    examples = grain.MapDataset.range(count * size).seed(0).random_map(read)
    return Batches(_start(rows_of_batches(examples, size, rows), config), count_of(source, config))


def scored_batches(
    source: Any,
    image_size: int,
    batch_size: int,
    *,
    rows: Sequence[int],
    threads: int = 16,
    alpha_background: str = transforms.WHITE,
    **resizing: Any,
) -> Batches:
    """The images of some records, in their order, for scores.

    Args:
      source: records.
      image_size: side of the images, in pixels.
      batch_size: rows of every batch; the last is padded.
      rows: record numbers: those that are left to do, or a host's share of them.
      threads: that decode.
      alpha_background: see `transforms.to_rgb`.
      **resizing: how images are resized; see `transforms.resize`.

    Returns:
      Batches of `image` uint8[B, H, W, 3], `index` int32[B], the record's number, and `valid`
      bool[B]: false where a row is padding or its image cannot be read.
    """
    rows = list(rows)
    padded = -(-len(rows) // batch_size) * batch_size
    scored = Scored(source, image_size, rows, resizing, alpha_background)
    dataset = grain.MapDataset.range(padded).seed(0).random_map(scored)
    return Batches(_read(dataset.batch(batch_size), threads), Skipped(len(source)))


def record_numbers(source: Any, config: ConfigDict, step: int) -> list[int]:
    """The records of the global batch of a step (from 0), before any was replaced."""
    order, size = _order(source, config), config.data.batch_size
    numbers: list[Any] = [order[i] for i in range(step * size, (step + 1) * size)]
    return list(map(int, numbers))


def _order(source: Any, config: ConfigDict) -> grain.MapDataset[int]:
    """Record numbers without end: every part in an order of its own that changes every epoch."""
    if getattr(source, "in_order", False):
        return grain.MapDataset.range(len(source)).seed(config.seed).repeat()
    if not isinstance(source, sources.Mixture):
        return grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat()
    parts = [
        grain.MapDataset.range(*ends).seed(config.seed + number).shuffle().repeat()
        for number, ends in enumerate(source.ranges)
    ]
    return grain.MapDataset.mix(parts, weights=source.weights).seed(config.seed)


def _start(dataset: grain.MapDataset[Batch], config: ConfigDict) -> grain.IterDataset[Batch]:
    """Threads, in this process or in several of their own."""
    threads, workers = config.data.threads, config.data.workers
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's workers ask for flags, wherever we run
            flags.FLAGS.mark_as_parsed()
        threads = -(-threads // workers)
    iterable = _read(dataset, threads)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return iterable


@contextlib.contextmanager
def _signals_kept_from_children() -> Iterator[None]:
    """Processes started meanwhile never hear SIGTERM or SIGINT: whoever starts them ends them.

    Such a signal goes to all processes of a group (SLURM, a launcher, a terminal). The run answers
    it by saving itself, and needs its workers until then. A mask is inherited, so there is no
    moment at which a new process could be hit; the signal waits, or another thread of ours has it.
    """
    resource_tracker.ensure_running()  # which, when it starts later, lets these signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(index: int, count: int) -> None:
    """A worker that hears no signal must not outlive a run that was killed."""
    del index, count
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read(dataset: grain.MapDataset[Batch], threads: int) -> grain.IterDataset[Batch]:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    return dataset.to_iter_dataset(options)


# ------------------------------------------------------------------------------------- sources

# Sources that are opened elsewhere, by functions (name, config, training) -> source.
OTHERS = dict.fromkeys(("stories", "easy_stories"), "blip2_jax.digits.stories:open_source")
# Of a mixture's part; `randaugment` is read by `make_example`.
PART_KEYS = ("source", "dir", "images", "form", "columns", "split", "weight", "randaugment")


def make_source(config: ConfigDict, split: str) -> Any:
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
    return sources.Mixture(parts, data.mixture_by, weights)


def _source(
    config: ConfigDict, data: ConfigDict | SimpleNamespace, split: str, training: bool
) -> Any:
    if data.source in OTHERS:
        return resolve_name(OTHERS[data.source])(data.source, config, training)
    source = open_source(data, split)
    if data.source == "files" and not training and "{split}" not in data.dir:
        if not getattr(source, "by_split", False):
            raise ValueError(
                f"config.data.dir {data.dir!r} is the same for {config.data.split!r} and "
                f"{split!r}. Write {{split}} where the two differ, or set --config.eval.every=0."
            )
    mismatched = config.data.mismatched if training else 0.0
    return sources.Mismatched(source, mismatched) if mismatched else source


def open_source(data: Any, split: str) -> Any:
    """The records that a config's section names by `source`, `dir`, `images`, `form`, `columns`
    and `index_dir`.

    Raises:
      ValueError: there is no such source, or nothing that can be read.
    """
    if data.source == "tfds":
        return sources.TfdsSource(data.dir, split)
    if data.source == "files":
        return sources.open_files(
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


# ------------------------------------------------------------------------------------- reading


def count_of(source: Any, config: ConfigDict) -> Skipped:
    """A count that begins with what the source left out at its start.

    Raises:
      TooManySkipped: that is more than the bounded share already.
    """
    skipped = Skipped(len(source), config.data.max_skipped)
    if hasattr(source, "faults"):
        skipped.merge(source.faults)
        skipped.total = len(source) + skipped.count
    skipped.check()
    return skipped


class Reader:
    """(record number, rng) -> example; steps over records that cannot be read.

    The replacement is the record a golden share of the part further on, and so on: always the
    same, and those of a whole lost archive spread over the others.

    Raises:
      ValueError: 100 records in a row cannot be read.
    """

    def __init__(self, source: Any, example: ExampleOf):
        self.source, self.example = source, example
        self.ranges = getattr(source, "ranges", [(0, len(source))])

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """The example of a record, or of its replacement, with a note of what was wrong."""
        index = int(index)
        start, end = next(ends for ends in self.ranges if index < ends[1])
        faults: list[Fault] = []
        for _ in range(min(end - start, MAX_REPLACED)):
            # A copy of the generator's state: a replacement is drawn as its record would have been.
            state = rng.bit_generator.state
            try:
                return {**self.read(index, rng), FAULTS: _note(faults)}
            except RecordError as error:
                faults.append((index, error.reason, error.where))
                rng.bit_generator.state = state
                index = start + (index - start + _stride(end - start)) % (end - start)
        raise ValueError(
            f"{len(faults)} records in a row cannot be read; the last: {faults[-1][1]} "
            f"({faults[-1][2]}). See with blip2 prepare --check what is wrong."
        )

    def read(self, index: int, rng: np.random.Generator) -> Example:
        """One example.

        Raises:
          RecordError: it cannot be made; names the place.
        """
        try:
            return self.example(self.source[index], index, rng)
        except RecordError as error:
            where = error.where or sources.place(self.source, index)
            raise RecordError(error.reason, where) from error
        except KeyError as error:
            raise RecordError(f"no {error}", sources.place(self.source, index)) from error
        except UnicodeDecodeError as error:
            raise RecordError("not UTF-8", sources.place(self.source, index)) from error


class Scored(Reader):
    """(number, rng) -> image of the record `rows[number]`, `index`, `valid`; replaces nothing."""

    def __init__(
        self,
        source: Any,
        image_size: int,
        rows: Sequence[int],
        resizing: Mapping[str, Any],
        alpha_background: str,
    ):
        super().__init__(source, self._image)
        self.image_size, self.rows, self.resizing = image_size, rows, resizing
        self.alpha_background = alpha_background

    def _image(self, record: Record, index: int, rng: np.random.Generator) -> Example:
        del index, rng
        image = transforms.decode_image(record["image"], self.alpha_background)
        return {"image": transforms.resize(image, self.image_size, **self.resizing)}

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """What `rows[index]` holds; black, and not valid, beyond the end or if it is unreadable."""
        faults: list[Fault] = []
        example: Example = {"image": np.zeros((self.image_size, self.image_size, 3), np.uint8)}
        row = self.rows[index] if index < len(self.rows) else -1
        valid = row >= 0
        if valid:
            try:
                example = self.read(row, rng)
            except RecordError as error:
                faults.append((row, error.reason, error.where))
                valid = False
        marks: Example = {"index": np.int32(row), "valid": np.bool_(valid), FAULTS: _note(faults)}
        return {**example, **marks}


@functools.cache
def _stride(count: int) -> int:
    """About a golden share of `count`, and without a common divisor: reaches every record."""
    stride = max(1, round(GOLDEN * count))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def _note(faults: list[Fault]) -> np.ndarray:
    """Faults as uint8[FAULTS_SIZE]; as many as it holds, long places cut from the left."""
    out = np.zeros(FAULTS_SIZE, np.uint8)
    if faults:
        kept = [(index, reason[:100], where[-200:]) for index, reason, where in faults]
        while len(text := json.dumps(kept).encode()) > FAULTS_SIZE:
            kept.pop()
        out[: len(text)] = np.frombuffer(text, np.uint8)
    return out
