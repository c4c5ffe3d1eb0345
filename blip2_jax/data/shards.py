"""Shards of ArrayRecord that TFDS and this package read, written by many processes.

What a shard holds depends on its number alone, it gets its name when it is whole, and a note
beside it says what is in it and what was left out: a run that was killed goes on with the shards
that are missing. The folder is a TFDS data set when its last shard is there.

    OUT/train.plan.json                          what was asked for; another plan is refused
    OUT/shards/train-00003.json                  one note a finished shard
    OUT/NAME-train.array_record-00003-of-00128
    OUT/dataset_info.json, features.json         TFDS's; at the end
    OUT/prepared.json, README.md, report.html    counts, the data set's card, its histograms
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from blip2_jax.data import files, transforms
from blip2_jax.data.faults import RecordError, Skipped
from blip2_jax.data.source import Source, skipped_at_start
from blip2_jax.data.tally import Tally

# One record a group: any record is one read. JPEG does not get smaller by compression.
OPTIONS = "group_size:1,uncompressed"
KEPT = ("id", "image", "captions", "image_number")  # what has a place of its own in an example
QUALITY = 95  # of JPEGs that are made smaller

AT_ONCE = 128  # images that are captioned together

Captions = Callable[[list[Image.Image], list[dict[str, Any]]], list[dict[str, Any]]]
Checked = tuple[int, dict[str, Any], Image.Image]  # a record's number, itself, its decoded image


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to write.

    Attributes:
      out: folder, local or remote.
      name: of the data set; begins the shards' names.
      split: which the records belong to.
      records: number of records of the source.
      records_per_shard: of the source, so a shard may hold fewer.
      shorter_side: pixels that larger images are made smaller to; 0: bytes stay as they are.
      check: only look: decode everything, write nothing.
      duplicates: record numbers whose key occurred before.
      alpha_background: see `transforms.to_rgb`; of images that are made smaller or captioned.
    """

    out: str
    name: str
    split: str
    records: int
    records_per_shard: int
    shorter_side: int = 0
    check: bool = False
    duplicates: frozenset[int] = frozenset()
    alpha_background: str = transforms.WHITE

    @property
    def shards(self) -> int:
        """How many there are."""
        return max(1, math.ceil(self.records / self.records_per_shard))

    def numbers(self, shard: int) -> range:
        """The record numbers of a shard."""
        start = shard * self.records_per_shard
        return range(start, min(start + self.records_per_shard, self.records))

    def path(self, shard: int) -> str:
        """The file of a shard, named as TFDS names it."""
        name = f"{self.name}-{self.split}.array_record-{shard:05d}-of-{self.shards:05d}"
        return files.join(self.out, name)

    def note(self, shard: int) -> str:
        """The file that says what a finished shard holds."""
        return files.join(self.out, f"shards/{self.split}-{shard:05d}.json")


# ------------------------------------------------------------------------------------ examples


@functools.cache
def features() -> Any:
    """What an example holds, in TFDS's words; `extra` is JSON: questions, url, ..."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {
            "id": text,
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(text),
            "image_number": tfds.features.Scalar(np.int64),
            "extra": text,
        }
    )


@functools.cache
def _serializer() -> Any:
    from tensorflow_datasets.core import example_serializer

    return example_serializer.ExampleSerializer(features().get_serialized_info())


def serialize(example: dict[str, Any]) -> bytes:
    """An example as TFDS stores it; equal bytes in every process."""
    proto = _serializer().get_tf_example(features().encode_example(example))
    return proto.SerializeToString(deterministic=True)


def smaller(data: bytes, image: Image.Image, side: int) -> bytes:
    """An image's bytes with its shorter side at most `side` (0: any) pixels."""
    scale = side / min(image.size) if side else 1
    if scale >= 1:
        return data
    width, height = (max(1, round(scale * length)) for length in image.size)
    out = io.BytesIO()
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    resized.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def to_example(record: dict[str, Any], index: int, data: bytes) -> dict[str, Any]:
    """A record as TFDS encodes it; `data` are the image's bytes."""
    extra = {key: value for key, value in record.items() if key not in KEPT}
    return {
        "id": record["id"],
        "image": io.BytesIO(data),
        "captions": record["captions"],
        "image_number": record.get("image_number", index),
        "extra": json.dumps(extra, ensure_ascii=False) if extra else "",
    }


# ------------------------------------------------------------------------------------- writing


def read_checked(
    source: Source,
    numbers: range,
    skipped: Skipped,
    duplicates: frozenset[int] = frozenset(),
    alpha_background: str = transforms.WHITE,
) -> Iterator[Checked]:
    """The records of `numbers` that can be used."""
    for index in numbers:
        try:
            if index in duplicates:
                raise RecordError("duplicated key", source.where(index))
            record = source[index]
            yield index, record, transforms.decode_image(record["image"], alpha_background)
        except RecordError as error:
            skipped.add(error.reason, error.where or source.where(index))


def write_shard(
    source: Source, plan: Plan, shard: int, captions: Captions | None = None
) -> dict[str, Any]:
    """Writes one shard and its note, which it returns.

    Args:
      source: where the records come from.
      plan: what to write.
      shard: its number.
      captions: makes other records of those of a shard (see `capfilt`).
    """
    skipped, tally = Skipped(), Tally()
    records = read_checked(
        source, plan.numbers(shard), skipped, plan.duplicates, plan.alpha_background
    )
    if captions is not None:
        records = _recaptioned(records, captions)
    with contextlib.ExitStack() as stack:
        write = (lambda example: None) if plan.check else stack.enter_context(_writer(plan, shard))
        for index, record, image in records:
            data = smaller(record["image"], image, plan.shorter_side)
            write(to_example(record, index, data))
            tally.add(record, image, len(data))
    note = {"records": tally.records, "skipped": skipped.to_json(), **tally.to_json()}
    if not plan.check:
        files.write(plan.note(shard), json.dumps(note).encode())
    return note


def _recaptioned(records: Iterable[Checked], captions: Captions) -> Iterator[Checked]:
    records = iter(records)
    while part := list(itertools.islice(records, AT_ONCE)):
        indexes, old, images = zip(*part, strict=True)
        yield from zip(indexes, captions(list(images), list(old)), images, strict=True)


@contextlib.contextmanager
def _writer(plan: Plan, shard: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes examples to a file that gets its name at the end."""
    from array_record.python import array_record_module

    local = files.is_local(plan.out)
    folder = plan.out if local else tempfile.mkdtemp()
    draft = os.path.join(folder, os.path.basename(plan.path(shard)) + ".partial")
    writer = array_record_module.ArrayRecordWriter(draft, OPTIONS)
    try:
        yield lambda example: writer.write(serialize(example))
        writer.close()
        if local:
            os.replace(draft, plan.path(shard))
        else:
            fs, inner = files.filesystem(plan.path(shard))
            fs.put_file(draft, inner)
    finally:
        if writer.is_open():
            writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(draft)
        if not local:
            os.rmdir(folder)


def finished(plan: Plan) -> dict[int, dict[str, Any]]:
    """Notes of the shards that are there, by number; half-written ones are removed."""
    fs, root = files.filesystem(plan.out)
    for path in fs.glob(f"{root}/{plan.name}-{plan.split}.*.partial"):
        fs.rm_file(path)
    notes = {}
    for shard in range(plan.shards):
        path = files.filesystem(plan.path(shard))[1]
        try:
            note = json.loads(files.read(plan.note(shard)))
        except (RecordError, ValueError):
            continue
        if fs.exists(path):
            notes[shard] = note
    return notes


def write_all(
    source: Source,
    plan: Plan,
    *,
    workers: int,
    max_skipped: float,
    captions: Captions | None = None,
) -> dict[str, Any]:
    """Writes the shards that are missing; returns the notes of all, added up: "lengths" (records
    of each shard), "skipped", "totals", "bins" and "samples".

    Args:
      source: where the records come from; travels to the workers.
      plan: what to write.
      workers: processes; 0: this one.
      max_skipped: share of all records that may be left out before it stops.
      captions: see `write_shard`; then this process does it all.

    Raises:
      ValueError: too much had to be left out; says what.
    """
    notes = {} if plan.check else finished(plan)
    skipped = skipped_at_start(source)
    skipped.max_share = max_skipped

    def take(shard: int, note: dict[str, Any]) -> None:
        notes[shard] = note
        skipped.merge(note["skipped"])
        bar.update(len(plan.numbers(shard)))
        skipped.check()

    missing = [shard for shard in range(plan.shards) if shard not in notes]
    desc = f"checking {plan.split}" if plan.check else plan.split
    with tqdm(total=plan.records, desc=desc, unit=" records") as bar:
        for shard, note in list(notes.items()):
            take(shard, note)
        if workers and captions is None:
            for shard, note in _in_processes(source, plan, missing, workers):
                take(shard, note)
        else:
            for shard in missing:
                take(shard, write_shard(source, plan, shard, captions))
    tally, skipped = Tally(), skipped_at_start(source)
    for shard in range(plan.shards):  # in order, whichever was done first
        tally.merge(notes[shard])
        skipped.merge(notes[shard]["skipped"])
    lengths = [notes[shard]["records"] for shard in range(plan.shards)]
    return {"lengths": lengths, "skipped": skipped.to_json(), **tally.to_json()}


_job: tuple[Source, Plan]  # of a worker process: its source and its plan


def _start_worker(source: Source, plan: Plan) -> None:
    global _job
    _job = source, plan


def _work(shard: int) -> tuple[int, dict[str, Any]]:
    source, plan = _job
    return shard, write_shard(source, plan, shard)


def _in_processes(
    source: Source, plan: Plan, shards: Sequence[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Notes as shards get done, in any order."""
    if not shards:
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(shards)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(source, plan),
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(_work, s) for s in shards]):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ValueError(
            "A worker process died, perhaps for want of memory. What is finished is kept: the "
            "same command goes on; --workers=N takes fewer of them."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_metadata(plan: Plan, description: str, lengths: dict[str, tuple[list[int], int]]) -> None:
    """What makes the folder a TFDS data set.

    Args:
      plan: of one of the splits.
      description: goes into the data set's info.
      lengths: of every split, the records of its shards and the bytes of all.
    """
    import tensorflow_datasets as tfds

    with tempfile.TemporaryDirectory() as folder:
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder,
            dataset_name=plan.name,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )
        for split, (counts, _) in lengths.items():
            # The writer of the info looks at the names of the shards, not into them.
            for shard in range(len(counts)):
                name = f"{plan.name}-{split}.array_record-{shard:05d}-of-{len(counts):05d}"
                open(os.path.join(folder, name), "w").close()
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features(),
            split_infos=[
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=counts,
                    num_bytes=size,
                    filename_template=template.replace(split=split),
                )
                for split, (counts, size) in lengths.items()
            ],
            filename_template=template,
            description=description,
            check_data=False,
        )
        for name in ("features.json", "dataset_info.json"):  # whose presence says: it is whole
            with open(os.path.join(folder, name), "rb") as file:
                files.write(files.join(plan.out, name), file.read())
