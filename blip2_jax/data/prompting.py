"""Prompts: the `<image>` placeholder in them, and how they are truncated."""

import bisect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from blip2_jax.data import tokenizers
from blip2_jax.data.language import IMAGE_TOKEN, LanguageConfig

# "Question: ... Short answer:", "USER: ... ASSISTANT:": a first word with a colon, and a last one,
# which a capitalized word may precede.
_FORM = re.compile(r"\A(\w+:\s)?(.*?)(\s+(?:[A-Z]\w*\s+)?\w+:\s*)?\Z", re.DOTALL)


class TextPrompt(NamedTuple):
    """A prompt; where it is too long, `text` is truncated, and `before` and `after` are kept."""

    before: str
    text: str
    after: str

    def __str__(self) -> str:
        return self.before + self.text + self.after


def fill(template: str, text: str) -> TextPrompt:
    """The template with a text, a question usually, in place of {}."""
    before, _, after = template.partition("{}")
    return TextPrompt(before, text, after.replace("{}", text))


def parse(prompt: str) -> TextPrompt:
    """A prompt of one's own: the cues at its ends, as in "Q: ... A:", are its form."""
    ((before, text, after),) = _FORM.findall(prompt)
    return TextPrompt(before, text, after)


def strip_image_token(prompt: str, num_query_tokens: int) -> str:
    """A prompt without transformers' placeholder, which must stand where the queries go: in front.

    Args:
      prompt: any text. One `<image>`, or one for each query, may stand before it.
      num_query_tokens: of the model.

    Raises:
      ValueError: there are others, or they stand elsewhere.
    """
    text = prompt.lstrip()
    if IMAGE_TOKEN not in text:
        return prompt
    for count in (num_query_tokens, 1):
        rest = text.removeprefix(count * IMAGE_TOKEN)
        if rest != text and IMAGE_TOKEN not in rest:
            return rest.lstrip()
    raise ValueError(
        f"{prompt!r} does not hold {IMAGE_TOKEN} where the image goes. The queries of the one "
        f"image stand before the text: write {IMAGE_TOKEN} once, in front, or leave it out."
    )


def fit(tokenizer: Any, prompt: TextPrompt, room: int, *, llm: LanguageConfig | None = None) -> str:
    """The prompt, its text cut from the end until it has `room` tokens, special ones included.

    See `tokenizers.tokenize` for `llm`.

    Raises:
      ValueError: there is no room for the form alone.
    """

    def count(length: int) -> int:
        return len(tokenizers.tokenize(tokenizer, [cut(length)], llm=llm)[0])

    def cut(length: int) -> str:
        return str(prompt._replace(text=prompt.text[:length].rstrip()))

    too_long = bisect.bisect_right(range(len(prompt.text) + 1), room, key=count)
    if not too_long:
        raise ValueError(
            f"truncate is {room}, and the prompt has {count(0)} tokens without the text that may "
            f"be cut ({cut(0)!r}). Allow more, or take a shorter prompt."
        )
    return cut(too_long - 1)


def tokenize(
    tokenizer: Any,
    texts: Sequence[str | TextPrompt],
    truncate: int | None = None,
    *,
    llm: LanguageConfig | None = None,
) -> list[list[int]]:
    """Ids of texts and prompts with the tokenizer's own special tokens, as `tokenizers.tokenize`.

    Args:
      tokenizer, llm: see there.
      texts: any number.
      truncate: the most tokens of each, special ones included. Longer texts lose their end; of
        longer prompts only the text is cut.

    Raises:
      ValueError: there is no room for a prompt's form.
    """
    token_ids = tokenizers.tokenize(tokenizer, [str(text) for text in texts], llm=llm)
    if truncate is None:
        return token_ids
    room = truncate

    def cut(text: str | TextPrompt) -> list[int]:
        if isinstance(text, TextPrompt):
            return tokenizers.tokenize(tokenizer, [fit(tokenizer, text, room, llm=llm)], llm=llm)[0]
        return tokenizers.tokenize(tokenizer, [text], room, llm=llm)[0]

    return [
        row if len(row) <= room else cut(text) for row, text in zip(token_ids, texts, strict=True)
    ]
