"""From what users hold (images, texts, prompts) to the arrays of a batch."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from blip2_jax.data import prompting, tokenizers, transforms
from blip2_jax.data.prompting import TextPrompt
from blip2_jax.inference import images as image_files
from blip2_jax.inference.batching import BatchReader, power_of_two
from blip2_jax.models.blip2 import Blip2Config, LLMConfig

MIN_TEXT_LENGTH = 8  # tokens that texts are padded to at least
MAX_RANKED_LENGTH = 512  # tokens of a prompt with one of its candidates

# (arrays of distinct images, index of each example's image) -> visual prompts of the examples.
Encode = Callable[[list[np.ndarray], np.ndarray], jax.Array]


class Inputs:
    """Readers of arrays, batch by batch (see `batching.BatchReader`).

    Args:
      config: the model's sizes.
      qformer_tokenizer, llm_tokenizer: None where the model has no use for them.
      source: where the model is from, for messages.
    """

    def __init__(
        self, config: Blip2Config, qformer_tokenizer: Any, llm_tokenizer: Any, source: str
    ):
        self.config, self.source = config, source
        self.qformer_tokenizer, self.llm_tokenizer = qformer_tokenizer, llm_tokenizer

    @property
    def llm(self) -> LLMConfig:
        """The language model's config.

        Raises:
          ValueError: there is none.
        """
        if self.config.llm is None:
            raise ValueError(f"{self.source} has no language model.")
        return self.config.llm

    def images(self, images: Sequence[Any], skipped: dict[int, str] | None = None) -> BatchReader:
        """Pixels, uint8[N, H, W, 3]; images that cannot be read go into `skipped`."""

        def read(start: int, stop: int) -> list[np.ndarray]:
            return [self._pixels(images[start:stop], start, skipped)]

        return read

    def _pixels(
        self, images: Sequence[Any], first: int, skipped: dict[int, str] | None
    ) -> np.ndarray:
        vit = self.config.vit
        resizing = transforms.resizing_of(vit)
        return image_files.load_batch(images, vit.image_size, first=first, skip=skipped, **resizing)

    def texts(
        self, texts: Sequence[str] | Sequence[TextPrompt], truncate: int | None
    ) -> BatchReader:
        """Texts or prompts for the Q-Former: ids and mask, int32[N, T]."""
        tokenizer = self.qformer_tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{self.source} came without the Q-Former's tokenizer; pass load(..., "
                "qformer_tokenizer=FOLDER), BERT's with [DEC] added."
            )
        room = self.config.qformer.max_position_embeddings
        token_ids = prompting.tokenize(tokenizer, texts, check_truncate(truncate))
        for number, ids in enumerate(token_ids):
            if len(ids) > room:
                raise ValueError(
                    f"Text {number} has {len(ids)} tokens, the Q-Former reads {room} at most. "
                    f"Shorten it, or pass truncate={room}."
                )

        def read(start: int, stop: int) -> list[np.ndarray]:
            batch = token_ids[start:stop]
            length = min(power_of_two(max(map(len, batch)), MIN_TEXT_LENGTH), room)
            return list(tokenizers.pad_rows(tokenizer, batch, length, side="right"))

        return read

    def pairs(
        self,
        images: Sequence[Any],
        texts: Sequence[str],
        truncate: int | None,
        skipped: dict[int, str] | None,
    ) -> BatchReader:
        """Pixels of image i, and ids and mask of text i."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts; give as many of each.")
        need_some(texts)
        read_texts, read_images = self.texts(texts, truncate), self.images(images, skipped)

        def read(start: int, stop: int) -> list[np.ndarray]:
            return [*read_images(start, stop), *read_texts(start, stop)]

        return read

    def prompts(
        self,
        images: Sequence[Any] | None,
        prompts: Sequence[TextPrompt],
        max_new_tokens: int,
        truncate: int | None,
        skipped: dict[int, str] | None,
        encode: Encode,
    ) -> BatchReader:
        """Arrays of a generation: request numbers, ids and mask of prompts, and visual prompts."""
        tokenizer, llm = self.llm_tokenizer, self.llm
        token_ids = prompting.tokenize(tokenizer, prompts, check_truncate(truncate), llm=llm)
        num_queries, room = self.config.qformer.num_query_tokens, llm.max_length
        for number, ids in enumerate(token_ids):
            needed = num_queries + len(ids) + max_new_tokens
            if room is not None and needed > room:
                raise ValueError(
                    f"Prompt {number} has {len(ids)} tokens; with {num_queries} visual ones and "
                    f"{max_new_tokens} to generate that makes {needed}, and the language model "
                    f"has {room} positions. Shorten it, or pass truncate=N."
                )
        visual = None
        if images is not None:
            visual = self.visual_prompts(images, prompts, truncate, skipped, encode)

        def read(start: int, stop: int) -> list[Any]:
            batch = token_ids[start:stop]
            length = power_of_two(max(map(len, batch)), MIN_TEXT_LENGTH)
            side = llm.padding_side
            ids, mask = tokenizers.pad_rows(tokenizer, batch, length, side=side, llm=llm)
            arrays = [np.arange(start, stop, dtype=np.int32), ids, mask]
            return arrays if visual is None else [*arrays, visual(start, stop)]

        return read

    def answers(
        self,
        images: Sequence[Any],
        prompts: Sequence[TextPrompt],
        answers: Sequence[str],
        encode: Encode,
    ) -> BatchReader:
        """Arrays of a ranking: ids, mask and labels as in training, and visual prompts."""
        visual = self.visual_prompts(images, prompts, None, None, encode)
        tokenizer, llm = self.llm_tokenizer, self.llm
        room = llm.max_length or MAX_RANKED_LENGTH
        room = min(room - self.config.qformer.num_query_tokens, MAX_RANKED_LENGTH)

        def tokens_of(number: int) -> tuple[np.ndarray, ...]:
            prompt, answer = str(prompts[number]), answers[number]
            if llm.is_encoder_decoder:
                return tokenizers.encode_prefix(tokenizer, [prompt], [answer], room, room)
            return tokenizers.encode_answers(
                tokenizer, llm, [prompt], [answer], room, room, end=False
            )

        def read(start: int, stop: int) -> list[Any]:
            encoded = [tokens_of(number) for number in range(start, stop)]
            ids, mask, labels = map(np.concatenate, zip(*encoded, strict=True))
            longest = int(max(mask.sum(axis=1).max(), (labels >= 0).sum(axis=1).max()))
            if longest >= room:
                raise ValueError(
                    f"A prompt with one of its candidates has {room} tokens or more, which is all "
                    "there is room for. Shorten it."
                )
            length = min(power_of_two(longest, MIN_TEXT_LENGTH), room)
            return [ids[:, :length], mask[:, :length], labels[:, :length], visual(start, stop)]

        return read

    def visual_prompts(
        self,
        images: Sequence[Any],
        prompts: Sequence[TextPrompt],
        truncate: int | None,
        skipped: dict[int, str] | None,
        encode: Encode,
    ) -> Callable[[int, int], jax.Array]:
        """Visual prompts, float[size of the program, Q, D].

        Examples with the same image (and, where the Q-Former reads the prompt, the same prompt)
        are encoded once. Images that cannot be read go into `skipped`, if that is given.
        """
        read_texts = self.texts(prompts, truncate) if self.config.qformer_reads_prompt else None

        def read(start: int, stop: int) -> jax.Array:
            batch = list(images[start:stop])  # held, so that each has an identity of its own
            keys = [
                (id(image), prompts[start + i] if read_texts else None)
                for i, image in enumerate(batch)
            ]
            first: dict[Any, int] = {}  # the first example with each key
            for i, key in enumerate(keys):
                first.setdefault(key, i)
            faults: dict[int, str] | None = None if skipped is None else {}
            pixels = [self._pixels([batch[i]], start + i, faults) for i in first.values()]
            if faults and skipped is not None:
                for i, key in enumerate(keys):
                    if start + first[key] in faults:
                        skipped[start + i] = faults[start + first[key]]
            arrays = [np.concatenate(pixels)]
            if read_texts:
                arrays += [x[list(first.values())] for x in read_texts(start, stop)]
            index = {key: i for i, key in enumerate(first)}
            return encode(arrays, np.array([index[key] for key in keys], np.int32))

        return read


def need_some(items: Any) -> Any:
    """The same; ValueError if it is empty."""
    if not len(items):
        raise ValueError("There is nothing to do: no images, no texts.")
    return items


def as_texts(texts: Sequence[str] | str) -> list[str]:
    """One text or several as a list.

    Raises:
      ValueError: there is something else among them.
    """
    if texts is None or isinstance(texts, (bytes, Mapping)):
        raise ValueError(f"Here is a {type(texts).__name__} where a text or a list of texts goes.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Text {number} is {text!r}; it must be a str.")
    return texts


def check_truncate(truncate: Any) -> int | None:
    """The number of tokens as an int, or None for no limit; ValueError if it is neither."""
    if truncate is None:
        return None
    try:
        tokens = operator.index(truncate)
    except TypeError:
        tokens = 0
    if tokens < 1 or isinstance(truncate, bool):
        raise ValueError(f"truncate is {truncate!r}; it must be a whole number of tokens, or None.")
    return tokens


def paired(images: Any | None, prompts: Sequence[TextPrompt]) -> tuple[Any, list[TextPrompt]]:
    """As many images as prompts: one image, or one prompt, serves all."""
    prompts = list(prompts)
    if images is None:
        return None, prompts
    images = image_files.as_list(images)
    if len(prompts) == 1:
        prompts = prompts * len(images)
    if len(images) == 1:
        images = list(images) * len(prompts)
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(images)} images and {len(prompts)} prompts; give as many of each, or one of "
            "either."
        )
    return images, prompts
