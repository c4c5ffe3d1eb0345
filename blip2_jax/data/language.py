"""What a language model's config says of its texts, beside its tokenizer.

Whether an encoder reads the prompt, what begins and ends a text, and on which side rows are padded
are facts of the model. A tokenizer is only asked for the numbers of the tokens that these are.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

IMAGE_TOKEN = "<image>"  # of transformers' processors: stands for the queries, and is never read


class LanguageConfig(Protocol):
    """The traits of a language model that texts depend on, as `models.opt.OPTConfig` has them."""

    padding_side: ClassVar[str]  # of prompts: "left" where they are continued at their right end
    end_of_text: ClassVar[str]  # ends a text where `eos_token_ids` is empty (OPT: a newline)

    @property
    def family(self) -> str:
        """One of "opt", "llama" and "t5"."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt, as T5's does."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings."""

    @property
    def bos_token_id(self) -> int | None:
        """What begins a text of a decoder-only model; None: nothing."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a text; training writes the first."""

    @property
    def pad_token_id(self) -> int | None:
        """What fills up rows; None: the tokenizer's own."""


def check_vocabulary(tokenizer: Any, vocab_size: int, name: str) -> None:
    """Refuses a tokenizer with tokens that the embeddings have no row for.

    Args:
      tokenizer: any.
      vocab_size: rows of the embeddings.
      name: of the model, "language model" or "Q-Former".

    Raises:
      ValueError: naming both sizes and the first of the tokens.
    """
    extra = sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= vocab_size and token != IMAGE_TOKEN
    )
    if extra:
        where = getattr(tokenizer, "name_or_path", "") or "given"
        raise ValueError(
            f"The {name}'s embeddings have {vocab_size} rows, and the tokenizer ({where}) has "
            f"{extra[-1][0] + 1} tokens; {extra[0][1]!r} is the first without a row. Take the "
            "tokenizer that belongs to the weights, or resize the embeddings (transformers: "
            "model.resize_token_embeddings(len(tokenizer))) and save the model."
        )


def token_of(tokenizer: Any, text: str) -> int:
    """The one token that a text is when it ends another.

    Raises:
      ValueError: it is none (some tokenizers drop white space), several, or unknown.
    """
    number = tokenizer.get_vocab().get(text)
    if number is not None:
        return int(number)
    alone, ended = tokenizer(["a", f"a{text}"], add_special_tokens=False)["input_ids"]
    rest = ended[len(alone) :]
    if ended[: len(alone)] != alone or len(rest) != 1 or rest[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"The end of a text, {text!r}, is no token of this tokenizer (it makes {rest} of it). "
            "Set config.data.end_of_text to one of its tokens, or eos_token_id in the "
            "generation_config.json of the model's folder."
        )
    return int(rest[0])


def end_ids(tokenizer: Any, llm: LanguageConfig) -> tuple[int, ...]:
    """Tokens that end a text: as the model's config says, or its family's own (OPT: 50118).

    Raises:
      ValueError: nothing says one.
    """
    if llm.eos_token_ids:
        return llm.eos_token_ids
    if llm.end_of_text:
        return (token_of(tokenizer, llm.end_of_text),)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "Neither the language model's config nor its tokenizer names an end token; set "
            "eos_token_id in the generation_config.json of the model's folder."
        )
    return (int(tokenizer.eos_token_id),)


def with_end(tokenizer: Any, llm: Any, end_of_text: str) -> Any:
    """The config of a language model that is taught to end its texts in this way.

    Args:
      tokenizer: the model's.
      llm: its config; see `LanguageConfig`.
      end_of_text: `config.data.end_of_text`; "": the model's own.

    Raises:
      ValueError: the text is not one token; an encoder-decoder ends in its own way only.
    """
    ids = end_ids(tokenizer, llm)
    if end_of_text:
        number = token_of(tokenizer, end_of_text)
        if number not in ids and llm.is_encoder_decoder:
            raise ValueError(
                f"config.data.end_of_text is {end_of_text!r}, but the tokenizer of an "
                "encoder-decoder ends every text by its own end token; set it to ''."
            )
        ids = (number, *(i for i in ids if i != number)) if number in ids else (number,)
    return dataclasses.replace(llm, eos_token_ids=ids)


def begin_ids(tokenizer: Any, llm: LanguageConfig) -> list[int]:
    """What stands before every text of a decoder-only model: its begin token, or nothing.

    Where the tokenizer puts a begin token there itself it is that one, which may be another than
    the config's (InstructBLIP's Vicuna was trained with `</s>`); else it is the config's.
    """
    return _own_begin(tokenizer) or missing_begin(tokenizer, llm)


def missing_begin(tokenizer: Any, llm: LanguageConfig) -> list[int]:
    """The begin token of a decoder-only model where its tokenizer does not put one itself."""
    if llm.is_encoder_decoder or llm.bos_token_id is None or _own_begin(tokenizer):
        return []
    return [llm.bos_token_id]


def _own_begin(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text."""
    text = "a"
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    starts = (n for n in range(len(whole)) if whole[n : n + len(alone)] == alone)
    return list(whole[: next(starts, 0)])


def pad_id(tokenizer: Any, llm: LanguageConfig | None = None) -> int:
    """What fills up rows: as the model's config says, else the tokenizer, else 0.

    Args:
      tokenizer: the model's.
      llm: the config of a language model; None for a Q-Former.
    """
    pad_token_id = None if llm is None else llm.pad_token_id
    if llm is None or pad_token_id is None or pad_token_id >= llm.vocab_size:
        pad_token_id = tokenizer.pad_token_id
    return 0 if pad_token_id is None else int(pad_token_id)
