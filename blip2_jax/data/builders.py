"""The same records as a TFDS builder: for those who build with TFDS, or beyond one machine.

    builder = ImageText(dataset="coco", dir="/data/coco", splits=("train", "test"), data_dir=OUT)
    builder.download_and_prepare()

`blip2 prepare` is what one machine needs. Where Apache Beam is installed
(`pip install 'blip2_jax[beam]'`) and `beam=True`, the records are made by Beam's workers, on the
runner that `download_config`'s `beam_options` name (Dataflow, Flink, Spark, or this machine):
record numbers are what is distributed, every worker opens the source by itself.
"""

import functools
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from blip2_jax.data import datasets, shards, sources, transforms
from blip2_jax.data.faults import Skipped
from blip2_jax.data.source import Source

RANGE = 256  # record numbers that are one unit of a worker's work


class ImageText(tfds.core.GeneratorBasedBuilder):
    """Image-text pairs: tars, lists, or a data set in its owners' form.

    Args:
      dataset: "files" or one of `datasets.NAMES`.
      dir: where it is; `{split}` in it stands for the split.
      splits: which to build.
      images: folder of the images that lists name; "": see `datasets.open_dataset`.
      form: of lists: a record an "image", a "caption" or a "question".
      columns: of lists: which columns hold what; see `columns.Columns`.
      shorter_side: pixels that larger images are made smaller to; 0: bytes stay as they are.
      alpha_background: see `transforms.to_rgb`; of images that are made smaller.
      beam: whether Beam makes the records.

    Attributes:
      skipped: what was left out, by split (not with Beam, whose counters have it).
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        dataset: str = "files",
        dir: str = "",
        splits: tuple[str, ...] = ("train",),
        images: str = "",
        form: str = "image",
        columns: str = "",
        shorter_side: int = 0,
        alpha_background: str = transforms.WHITE,
        beam: bool = False,
        **kwargs: Any,
    ):
        self._open = functools.partial(
            open_source, dataset, dir, images=images, form=form, columns=columns
        )
        self.split_names, self.beam = splits, beam
        self._smaller = (shorter_side, alpha_background)
        self.skipped = {split: Skipped() for split in splits}
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.__doc__, features=shards.features(), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self.split_names}

    def _generate_examples(self, split: str) -> Any:
        source = self._open(split)
        if not self.beam:
            numbers = range(len(source))
            return examples(source, numbers, *self._smaller, self.skipped[split])
        import apache_beam as beam

        make = functools.partial(make_range, self._open, split, len(source), *self._smaller)
        starts = range(0, len(source), RANGE)
        return beam.Create(starts) | beam.Reshuffle() | beam.FlatMap(make)


def open_source(
    dataset: str, dir: str, split: str, *, images: str, form: str, columns: str
) -> Source:
    """The source of one split."""
    if dataset == "files":
        return sources.open_files(dir, images=images, split=split, form=form, columns=columns)
    return datasets.open_dataset(dataset, dir, split, images, form=form, columns=columns)


def examples(
    source: Source, numbers: range, shorter_side: int, alpha_background: str, skipped: Skipped
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Keys and examples of those records that can be used."""
    checked = shards.read_checked(source, numbers, skipped, alpha_background=alpha_background)
    for index, record, image in checked:
        yield (
            index,
            shards.to_example(record, index, shards.smaller(record["image"], image, shorter_side)),
        )


@functools.lru_cache(maxsize=4)
def _opened(open_split: functools.partial[Any], split: str) -> Any:
    return open_split(split)


def make_range(
    open_split: functools.partial[Any],
    split: str,
    count: int,
    shorter_side: int,
    alpha_background: str,
    start: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What a Beam worker does with the number of a range: its examples; faults go to counters."""
    from apache_beam.metrics import Metrics

    skipped = Skipped()
    numbers = range(start, min(start + RANGE, count))
    source = _opened(open_split, split)
    yield from examples(source, numbers, shorter_side, alpha_background, skipped)
    for reason, times in skipped.by_reason.items():
        Metrics.counter("blip2_jax skipped", reason).inc(times)
