"""Text alone, for the language model's pre-training: stories of scenes, and examples of them.

A story is a description of a scene, then captions of it, questions and answers, in any order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from blip2_jax.data import tokenizers
from blip2_jax.data.batch_spec import ArraySpec, Spec
from blip2_jax.data.examples import Example, ExampleOf
from blip2_jax.data.faults import Skipped
from blip2_jax.data.language import LanguageConfig
from blip2_jax.data.source import Record, Source
from blip2_jax.data.tokenizers import pad
from blip2_jax.digits import world
from blip2_jax.runtime import digest

# Weights of a story's tokens in the language model's pre-training. What cannot be foreseen (the
# description of a new scene, the choice of a question) teaches little.
UNFORESEEN, RETOLD, ANSWER = 0.1, 0.5, 1.0
BOS = ""  # in a list of pieces of text, the token that begins a text

QA_PROMPT = "Question: {} Answer:"  # the paper's zero-shot prompt for OPT (section 4.1)


WORDS = (
    *world.COLORS,
    *world.SIZES,
    *map(str, range(10)),
    *sorted({w for p in world.PLACES for w in p.split()}),
)


def word_list(rng: np.random.Generator, *, times: int = 4) -> list[str]:
    """Random words, repeated: they teach a model to attend to earlier tokens."""
    chosen = [world.pick(rng, WORDS) for _ in range(rng.integers(4, 20))]
    return [" ".join(chosen)] * times


def easy_story(rng: np.random.Generator) -> list[str]:
    """A story of one or two things, told three times in full, with up to three questions.

    Repeated descriptions make nearly every token depend on which attribute belongs to which digit:
    after "the 3 is" comes the color that stood beside the 3. Half of the stories have no places.
    Returns segments as `story` does.
    """
    scene = world.sample_scene(rng, max_things=2)
    kinds = list(world.QUESTION_TYPES)
    if rng.random() < 0.5:
        scene = tuple(thing._replace(place=None) for thing in scene)
        kinds.remove("place")
    asked = [world.ask(scene, str(kind), rng) for kind in rng.permutation(kinds)[:3]]
    segments = [
        f"{QA_PROMPT.format(question.question)} {question.answer}"
        for question in asked
        if "None" not in question.question  # asks for a place, and the scene has none
    ]
    for _ in range(2):
        segments.insert(rng.integers(len(segments) + 1), world.describe(scene, rng))
    return [world.describe(scene, rng), *segments]


def story(
    rng: np.random.Generator, *, max_things: int = 3, asked: int = 6, undescribed: float = 0.1
) -> list[str]:
    """Text alone about one scene of the training world: a description, then what follows from it.

    Whatever follows stands in random order, so that a caption or a question may come first after
    the description, as it does when a visual prompt replaces the description. Some stories have no
    description: they teach the model what to generate without a prompt.

    Args:
      rng: the only source of randomness.
      max_things: the most things a scene holds (see `world.sample_scene`).
      asked: number of questions.
      undescribed: share of stories without a description.

    Returns:
      Segments, each a line of its own when written out; the first is the description (or "").
    """
    scene = world.sample_scene(rng, max_things=max_things)
    kinds = [
        *world.QUESTION_TYPES,
        "color",
        "digit",
        "exist",
        "place",
    ]  # binding is asked more often
    segments = []
    for type in rng.permutation(kinds)[:asked]:
        question = world.ask(scene, str(type), rng)
        segments.append(f"{QA_PROMPT.format(question.question)} {question.answer}")
    segments.insert(rng.integers(len(segments) + 1), world.caption(scene, rng))
    first = world.describe(scene, rng) if rng.random() < 1 - undescribed else ""
    return [first, *segments]


# --------------------------------------------------------------------------------------- records


class StorySource(Source):
    """Stories of the embedded world, written as they are read: number i depends on (seed, i) alone.

    A small language model learns which attribute belongs to which digit only from easy to hard.

    Args:
      kind: "stories" (`story`), "described_stories" (none of which lacks its description:
        what can be known is measured on them) or "easy_stories" (`easy_story`, and word
        lists).
      count: number of stories.
      seed: of all of them.
      warmup: share of the stories, from the first on, that are easier still: of "easy_stories"
        all are word lists there (and some afterwards); "stories" have two things at most.
    """

    LISTS = 0.15  # share of word lists among the easy stories after the warmup
    in_order = True  # from easy to hard, each read once

    def __init__(self, kind: str, count: int, seed: int, warmup: float = 0.0):
        self.kind, self.count, self.seed, self.warmup = kind, count, seed, warmup
        self.faults, self.notes = Skipped(), Skipped()

    def __len__(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        """See `Source`; without the number of stories: a run may go on for more steps."""
        return {"digest": digest.of_text(f"{self.kind} {self.seed} {self.warmup}")}

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.count:
            raise IndexError(f"story {index} of {self.count}")
        rng = np.random.default_rng([self.seed, index])
        early = index < self.warmup * self.count
        if self.kind == "described_stories":
            return {"story": story(rng, undescribed=0.0)}
        if self.kind == "stories":
            return {"story": story(rng, max_things=2 if early else 3)}
        if early or rng.random() < self.LISTS:
            return {"story": word_list(rng)}
        return {"story": easy_story(rng)}


def open_source(kind: str, config: ConfigDict, training: bool) -> StorySource:
    """The stories that a run trains on, or those that its loss is measured on.

    The latter are others than those trained on, all hard, and all with what the answers follow
    from.
    """
    if training:
        count = config.steps * config.data.batch_size
        return StorySource(kind, count, 0, config.data.story_warmup)
    count = max(1, config.eval.batches) * config.eval.batch_size
    return StorySource("described_stories", count, 1)


# -------------------------------------------------------------------------------------- examples


def load_tokenizers(config: ConfigDict) -> dict[str, Any]:
    """The language model's."""
    return {"llm": tokenizers.load(config.data.llm_tokenizer)}


def example_spec(config: ConfigDict, image_size: int, llm: LanguageConfig | None = None) -> Spec:
    """See `data.batch_spec`; `llm_weights` is what each token weighs as a target."""
    del image_size, llm
    shape = (config.data.llm_length,)
    tokens, weights = ArraySpec(shape, np.int32), ArraySpec(shape, np.float32)
    return {"llm_ids": tokens, "llm_mask": tokens, "llm_weights": weights}


def make_example(
    config: ConfigDict,
    image_size: int,
    *,
    train: bool,
    resample: str = "bicubic",
    llm: LanguageConfig | None = None,
) -> ExampleOf:
    """See `data.examples.make_example`: a story as `encode_stories` has it."""
    del image_size, train, resample, llm
    tokenizer, length = load_tokenizers(config)["llm"], config.data.llm_length

    def example(record: Record, index: int, rng: np.random.Generator) -> Example:
        del index, rng  # the record is the whole story
        ids, mask, weights = encode_stories(tokenizer, [record["story"]], length)
        return {"llm_ids": ids[0], "llm_mask": mask[0], "llm_weights": weights[0]}

    return example


def encode_stories(
    tokenizer: Any, stories: Sequence[Sequence[str]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stories (`story`) for a language model: every segment is BOS, text, newline.

    The description has no newline: a visual prompt, which takes its place later, has none.

    Returns:
      ids and mask, int32[B, length]; weights, float32[B, length], of each token as a target.
    """
    pieces: list[tuple[int, str, float]] = []  # story, text, weight; a BOS stands for itself
    for number, (description, *rest) in enumerate(stories):
        if description:
            pieces += [(number, BOS, UNFORESEEN), (number, description, UNFORESEEN)]
        for text in rest:
            question, colon, answer = text.partition("Answer:")
            if colon:
                pieces += [(number, BOS, UNFORESEEN), (number, question + colon, UNFORESEEN)]
                pieces += [(number, answer, ANSWER), (number, "\n", RETOLD)]
            else:
                pieces += [(number, BOS, RETOLD), (number, text + "\n", RETOLD)]
    encoded = tokenizer([text for _, text, _ in pieces], add_special_tokens=False)["input_ids"]
    token_ids: list[list[int]] = [[] for _ in stories]
    weights: list[list[float]] = [[] for _ in stories]
    for (number, text, weight), ids in zip(pieces, encoded, strict=True):
        ids = [tokenizer.bos_token_id] if text == BOS else ids
        token_ids[number] += ids
        weights[number] += [weight] * len(ids)
    mask = pad([[1] * len(row) for row in token_ids], length, 0)
    ids = pad(token_ids, length, tokenizer.pad_token_id)
    return ids, mask, pad(weights, length, 0.0, np.float32)
