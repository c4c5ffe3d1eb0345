"""Batches, as a pure function of the step.

    numbers -> shuffle, repeat -> record + randomness -> example -> this host's share -> batch

The randomness of an example comes from its place in the global order, before the hosts' shares are
cut, so the global batch of a step is the same for any number of hosts and after any restart.
A record that cannot be read is replaced by the next one that can, counted and reported.
"""

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from blip2_jax.data import digits, sources, tokenizers, transforms, world

Example = dict[str, np.ndarray]
MOST_BAD = 0.1  # share of a data set that may be unreadable before the run stops


class Skipped:
    """Counts records that could not be read, by reason; safe to share between threads."""

    def __init__(self, total: int):
        self.total = total
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Different records that were replaced so far."""
        return len(self._bad)

    def add(self, index: int, reason: Exception) -> None:
        with self._lock:
            self._bad[index] = str(reason)
            if len(self._bad) > max(1, MOST_BAD * self.total):
                raise ValueError(
                    f"{len(self._bad)} of {self.total} records cannot be read, the last one "
                    f"because: {reason}. Prepare the data again."
                )

    def report(self) -> None:
        """Prints what was skipped and why, if anything was."""
        if not self._bad:
            return
        print(f"Skipped {self.count} of {self.total} records:")
        for reason, n in collections.Counter(self._bad.values()).most_common(5):
            where = [i for i, r in sorted(self._bad.items()) if r == reason][:5]
            print(f"  {n} x {reason} (record {', '.join(map(str, where))}{', ...' * (n > 5)})")


class Batches:
    """An iterator of batches that closes its threads when a `with` block ends."""

    def __init__(self, dataset: grain.IterDataset, skipped: Skipped):
        self.skipped = skipped
        self._iterator = iter(dataset)

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        return next(self._iterator)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc: object) -> None:
        self._iterator.close()


def train_batches(config, image_size: int, *, start_step: int = 0) -> Batches:
    """This host's share of the global batches from `start_step` on, without end.

    Args:
      config: a recipe's config; `data` and `seed` decide.
      image_size: side of the images, from the model.
      start_step: number of batches that were seen before.
    """
    source = make_source(config, config.data.split)
    read, skipped = _reader(source, make_example(config, image_size, train=True))
    order = grain.MapDataset.range(len(source)).seed(config.seed)
    if config.data.source == "tfds":  # stories are in easy-to-hard order, each read once
        order = order.shuffle()
    local = _local_batch(config.data.batch_size)
    dataset = (
        order.repeat()
        .random_map(read)
        .slice(slice(jax.process_index(), None, jax.process_count()))
        .batch(local)
        .slice(slice(start_step, None))
        .to_iter_dataset(_read_options(config))
    )
    return Batches(dataset, skipped)


def heldout_batches(config, image_size: int) -> Batches:
    """The first `eval.batches` whole batches of `eval_split` (0: all), in order, not augmented."""
    source = make_source(config, config.data.eval_split)
    read, skipped = _reader(source, make_example(config, image_size, train=False))
    size = min(config.eval.batch_size, len(source))
    count = len(source) // size
    count = min(count, config.eval.batches) or count
    dataset = (
        grain.MapDataset.range(count * size)
        .seed(0)
        .random_map(read)
        .slice(slice(jax.process_index(), None, jax.process_count()))
        .batch(_local_batch(size))
        .to_iter_dataset(_read_options(config))
    )
    return Batches(dataset, skipped)


def _local_batch(size: int) -> int:
    if size % jax.process_count():
        raise ValueError(f"A batch of {size} does not divide over {jax.process_count()} hosts.")
    return size // jax.process_count()


def _read_options(config) -> grain.ReadOptions:
    threads = config.data.threads
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))


def make_source(config, split: str) -> Any:
    """The config's records of a split."""
    data = config.data
    if data.source == "tfds":
        return sources.TfdsSource(data.dir, split)
    if data.source in ("stories", "easy_stories"):
        if split == data.split:
            count = config.steps * data.batch_size
            return sources.StorySource(data.source, count, 0, data.story_warmup)
        count = max(1, config.eval.batches) * config.eval.batch_size
        # Others than those trained on, all hard, and all with what the answers follow from.
        return sources.StorySource("described_stories", count, 1)
    known = "tfds, stories, easy_stories"
    raise ValueError(f"config.data.source is {data.source!r}; known: {known}.")


def _reader(source: Any, example: Callable[..., Example]) -> tuple[Callable, Skipped]:
    """A function (index, rng) -> example that steps over unreadable records."""
    skipped = Skipped(len(source))

    def read(index: int, rng: np.random.Generator) -> Example:
        index = int(index)
        while True:
            # A copy of the generator's state: a replacement is drawn as its record would have been.
            state = rng.bit_generator.state
            try:
                return example(source[index], index, rng)
            except (transforms.ImageError, KeyError, UnicodeDecodeError) as error:
                skipped.add(index, error)
                rng.bit_generator.state = state
                index = (index + 1) % len(source)

    return read, skipped


# ----------------------------------------------------------------------------------- examples


def make_example(config, image_size: int, *, train: bool) -> Callable[..., Example]:
    """The function (record, index, rng) -> arrays that a stage's batches are made of."""
    data, stage = config.data, config.stage.name
    if stage == "pretrain_lm":
        return _story_example(tokenizers.load(data.llm_tokenizer), data.llm_length)

    def image(record: dict, rng: np.random.Generator) -> np.ndarray:
        decoded = transforms.decode_image(record["image"])
        if not train:
            return transforms.resize(decoded, image_size)
        return transforms.random_resized_crop(
            decoded, image_size, rng, scale=data.crop_scale, flip=data.flip
        )

    if stage == "pretrain_vit":
        return _patch_example(image, image_size // config.model.vit.patch_size, config.stage.labels)

    if stage == "stage1":
        tokenizer = tokenizers.load(data.qformer_tokenizer)

        def encode(text: str) -> Example:
            ids, mask = tokenizers.encode_qformer(tokenizer, [text], data.text_length)
            return {"text_ids": ids[0], "text_mask": mask[0]}

    else:
        tokenizer = tokenizers.load(data.llm_tokenizer or config.model.llm.source)

        def encode(text: str) -> Example:
            arrays = tokenizers.encode_captions(tokenizer, [text], data.llm_length, data.prompt)
            names = ("llm_ids", "llm_mask", "llm_labels")
            return {name: array[0] for name, array in zip(names, arrays, strict=True)}

    def example(record: dict, index: int, rng: np.random.Generator) -> Example:
        captions = record["captions"]
        text = captions[rng.integers(len(captions)) if train else 0]
        return {"image": image(record, rng), "image_id": np.int32(index), **encode(text)}

    return example


def _story_example(tokenizer: Any, length: int) -> Callable[..., Example]:
    def example(record: dict, index: int, rng: np.random.Generator) -> Example:
        del index, rng  # a story is what it is
        ids, mask, weights = tokenizers.encode_stories(tokenizer, [record["story"]], length)
        return {"llm_ids": ids[0], "llm_mask": mask[0], "llm_weights": weights[0]}

    return example


def _patch_example(image: Callable, grid: int, labels) -> Callable[..., Example]:
    """Patch labels of the embedded world: what the box that covers most of a patch holds."""
    names = {
        "digit": range(10),
        "color": world.COLORS,
        "size": world.SIZES,
        "place": world.PLACES,
    }

    def example(record: dict, index: int, rng: np.random.Generator) -> Example:
        del index
        arrays = {"image": image(record, rng)}
        scene = world.scene_from_json(record["scene"])
        owner = digits.patch_owners(record["boxes"], grid)
        for name, classes in labels.items():
            known = list(names[name])
            values = [known.index(getattr(thing, name)) for thing in scene] + [classes - 1]
            arrays[name] = np.array(values, np.int32)[owner]
        return arrays

    return example
