"""Batches, as a pure function of the step.

    numbers -> shuffle, repeat -> mix -> record, randomness -> example -> this host's rows -> batch

The record and the randomness of an example come from its place in the global order, before a host
takes its rows, so row k of a step's global batch is the same for any number of hosts, threads and
worker processes, and after any restart. Which rows a host reads is not decided here: it follows
from the mesh (`runtime.mesh.local_rows`).

A record that cannot be read is replaced by another that can, the same one every time. What was
wrong with it is noted in the batch; hosts add up their counts (`Batches.count_skipped`), and all
stop when the share of such records is too large.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from blip2_jax.data import transforms
from blip2_jax.data.batch_spec import Spec, check_batch, example_spec
from blip2_jax.data.examples import Example, make_example
from blip2_jax.data.faults import Skipped
from blip2_jax.data.language import LanguageConfig
from blip2_jax.data.mixtures import Mixture
from blip2_jax.data.reader import FAULTS, Fault, Reader, Scored, unpack_faults
from blip2_jax.data.source import Source, skipped_at_start
from blip2_jax.data.sources import make_source

Batch = dict[str, np.ndarray]  # examples of one kind, [B, ...] each


class Batches:
    """An iterator of batches that closes its threads or processes when a `with` block ends.

    Args:
      dataset: the batches, with a note of what could not be read in each row.
      skipped: receives what could not be read, when `count_skipped` is called.
      spec: what a batch holds (`batch_spec`); the first is held to it.

    Attributes:
      skipped: what could not be read, of all hosts.
      wait_seconds: time spent waiting for data.
    """

    def __init__(
        self, dataset: grain.IterDataset[Batch], skipped: Skipped, spec: Spec | None = None
    ):
        self.skipped = skipped
        self._spec = spec
        self.wait_seconds = 0.0
        self._iterator = iter(dataset)
        self._started = False
        # At this process's end too: Python would send workers SIGTERM, and wait for them.
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
            self._uncounted += unpack_faults(note)
        if self._spec is not None:
            check_batch(batch, self._spec)
            self._spec = None
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
        """Batches on the device, of which `count` are transferred in advance.

        Args:
          put: transfers a batch without waiting, as `jax.device_put` does.
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
      batch_rows: of each batch.
      batch_size: of the global batches.
    """

    def __init__(
        self, examples: grain.MapDataset[Example], batch_rows: Sequence[int], batch_size: int
    ) -> None:
        self._examples, self._rows, self._batch_size = examples, list(batch_rows), batch_size

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Example:
        step, row = divmod(int(index), len(self._rows))
        example: Any = self._examples[step * self._batch_size + self._rows[row]]
        return example


def rows_of_batches(
    examples: grain.MapDataset[Example], batch_size: int, batch_rows: Sequence[int] | None = None
) -> grain.MapDataset[Batch]:
    """Batches of some rows of each global batch.

    Args:
      examples: in global order: those of one batch after those of another.
      batch_size: of the global batches; a last one that is not whole is left out.
      batch_rows: which of them, from 0; None: all.
    """
    batch_rows = range(batch_size) if batch_rows is None else batch_rows
    if not batch_rows or not 0 <= min(batch_rows) <= max(batch_rows) < batch_size:
        raise ValueError(f"A batch of {batch_size} has no rows {list(batch_rows)}.")
    return grain.MapDataset.source(_Rows(examples, batch_rows, batch_size)).batch(len(batch_rows))


def train_batches(
    config: ConfigDict,
    image_size: int,
    *,
    start_step: int = 0,
    batch_rows: Sequence[int] | None = None,
    source: Source | None = None,
    skipped: Skipped | None = None,
    resample: str = "bicubic",
    llm: LanguageConfig | None = None,
) -> Batches:
    """Rows of the global batches from `start_step` on, without end.

    Args:
      config: a recipe's config; `data` and `seed` decide.
      image_size: side of the images, from the model.
      start_step: number of batches that were seen before.
      batch_rows: of each global batch, those to load (`runtime.mesh.local_rows`); None: all.
      source: what `make_source` gave for the config; None: it is asked.
      skipped: the count that goes on (`source.skipped_at_start`); None: a new one.
      resample, llm: see `make_example`.
    """
    source = make_source(config, config.data.split) if source is None else source
    skipped = skipped_at_start(source, config.data.max_skipped) if skipped is None else skipped
    read = Reader(source, make_example(config, image_size, train=True, resample=resample, llm=llm))
    examples = _order(source, config).random_map(read)
    batches = rows_of_batches(examples, config.data.batch_size, batch_rows)
    spec = example_spec(config, image_size, llm)
    return Batches(_start(batches.slice(slice(start_step, None)), config), skipped, spec)


def eval_batch_size(config: ConfigDict, source: Source, multiple: int = 1) -> int:
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
    batch_rows: Sequence[int] | None = None,
    source: Source | None = None,
    resample: str = "bicubic",
    llm: LanguageConfig | None = None,
) -> Batches:
    """The first `eval.batches` whole batches of `eval_split` (0: all), in order, not augmented.

    Args:
      config: a recipe's config.
      image_size: side of the images, from the model.
      batch_size: of the global batches; None: `eval_batch_size` says.
      batch_rows: of each global batch, those to load; None: all.
      source: what `make_source` gave for `eval_split`; None: it is asked.
      resample, llm: see `make_example`.
    """
    source = make_source(config, config.data.eval_split) if source is None else source
    size = batch_size or eval_batch_size(config, source)
    count = len(source) // size
    count = min(count, config.eval.batches) or count
    read = Reader(source, make_example(config, image_size, train=False, resample=resample, llm=llm))
    examples = grain.MapDataset.range(count * size).seed(0).random_map(read)
    return Batches(
        _start(rows_of_batches(examples, size, batch_rows), config),
        skipped_at_start(source, config.data.max_skipped),
        example_spec(config, image_size, llm),
    )


def scored_batches(
    source: Source,
    image_size: int,
    batch_size: int,
    *,
    numbers: Sequence[int],
    threads: int = 16,
    alpha_background: str = transforms.WHITE,
    **resizing: Any,
) -> Batches:
    """The images of some records, in their order, for scores.

    Args:
      source: records.
      image_size: side of the images, in pixels.
      batch_size: rows of every batch; the last is padded.
      numbers: of the records: those that are left to do, or a host's share of them.
      threads: that decode.
      alpha_background: see `transforms.to_rgb`.
      **resizing: how images are resized; see `transforms.resize`.

    Returns:
      Batches of `image` uint8[B, H, W, 3], `index` int32[B], the record's number, and `valid`
      bool[B]: false where a row is padding or its image cannot be read.
    """
    numbers = list(numbers)
    padded = -(-len(numbers) // batch_size) * batch_size
    scored = Scored(source, image_size, numbers, resizing, alpha_background)
    dataset = grain.MapDataset.range(padded).seed(0).random_map(scored)
    return Batches(_read(dataset.batch(batch_size), threads), Skipped(len(source)))


def record_numbers(source: Source, config: ConfigDict, step: int) -> list[int]:
    """The records of the global batch of a step (from 0), before any was replaced."""
    order, size = _order(source, config), config.data.batch_size
    numbers: list[Any] = [order[i] for i in range(step * size, (step + 1) * size)]
    return list(map(int, numbers))


def _order(source: Source, config: ConfigDict) -> grain.MapDataset[int]:
    """Record numbers without end: every part in an order of its own that changes every epoch."""
    if source.in_order:
        return grain.MapDataset.range(len(source)).seed(config.seed).repeat()
    if not isinstance(source, Mixture):
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
    """Processes started meanwhile do not receive SIGTERM or SIGINT; this process ends them.

    Such a signal goes to all processes of a group (SLURM, a launcher, a terminal). The run answers
    it by saving itself, and needs its workers until then. A mask is inherited, so there is no
    moment at which a new process could be hit; the signal waits, or another thread of ours has it.
    """
    resource_tracker.ensure_running()  # started later, it would unblock these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(index: int, count: int) -> None:
    """Ends a worker when its parent was killed: it receives no signal itself."""
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
