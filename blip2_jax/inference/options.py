"""Options of text generation: `Decoding`, and changes to one."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from blip2_jax.runtime.values import did_you_mean

# What transformers, LAVIS and others call some of the options, for "did you mean".
SYNONYMS = {
    **dict.fromkeys(("max_length", "max_len", "max_tokens"), "max_new_tokens"),
    **dict.fromkeys(("min_length", "min_len", "min_tokens"), "min_new_tokens"),
    **dict.fromkeys(("num_captions", "num_samples", "num_texts", "n"), "num_return_sequences"),
    **dict.fromkeys(("beams", "beam_size", "beam_width"), "num_beams"),
    **dict.fromkeys(("use_nucleus_sampling", "sample", "sampling"), "do_sample"),
    **dict.fromkeys(("output_scores", "scores", "logprobs"), "return_scores"),
    "ngram_size": "no_repeat_ngram_size",
}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How texts are generated; a static argument of compiled functions.

    Names and meanings are those of transformers' `GenerationConfig` where it has them.

    Attributes:
      max_new_tokens: the most tokens to generate, the end token included.
      min_new_tokens: the end token is not chosen before so many others.
      num_beams: width of the beam search; 1: greedy, or sampling.
      length_penalty: a beam's score is its log-probability over length ** length_penalty: above 0
        favors long texts, below 0 short ones.
      length_penalty_includes_prompt: whether that length counts the tokens of the prompt's text
        too (of an encoder-decoder, its start token).
      length_penalty_includes_eos: whether it counts the end token. Transformers since 4.36 counts
        the end token only; until 4.26 it counted the prompt only; and 4.27 to 4.35 neither, where
        prompts are given as embeddings.
      early_stopping: stop a prompt's search as soon as it has num_beams finished texts.
      repetition_penalty: scores of tokens that were seen are divided by it where positive and
        multiplied where negative (Keskar et al. 2019).
      no_repeat_ngram_size: no token is chosen that would complete so many tokens in a row that were
        seen before; 0: any.
      penalties_include_prompt: tokens of a decoder-only model's prompt count as seen in these two,
        as in transformers where it is given ids. False: only generated tokens, as in LAVIS, which
        gives it embeddings.
      do_sample: draw each token, instead of taking the likeliest.
      temperature, top_k, top_p: sharpen the distribution, keep its k likeliest tokens (0: all),
        and of those the fewest that hold the share p.
      num_return_sequences: how many texts a prompt; of beams the best, of samples each one.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    length_penalty_includes_prompt: bool = False
    length_penalty_includes_eos: bool = True
    early_stopping: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    penalties_include_prompt: bool = True
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = self.typed(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        wrong = [
            f"{name} is {value!r}; it must be {must}"
            for name, must, good in (
                ("max_new_tokens", "at least 1", lambda x: x >= 1),
                ("min_new_tokens", "from 0 to max_new_tokens", self._at_most("max_new_tokens", 0)),
                ("num_beams", "at least 1", lambda x: x >= 1),
                ("repetition_penalty", "above 0", lambda x: x > 0),
                ("no_repeat_ngram_size", "at least 0", lambda x: x >= 0),
                ("temperature", "above 0 (greedy: do_sample=False)", lambda x: x > 0),
                ("top_k", "at least 0", lambda x: x >= 0),
                ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
                ("num_return_sequences", "at least 1", lambda x: x >= 1),
            )
            if not good(value := getattr(self, name))
        ]
        if self.num_beams > 1 and self.do_sample:
            wrong.append("do_sample with num_beams above 1 is not supported; choose one of them")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            wrong.append(
                f"num_return_sequences is {self.num_return_sequences} of {self.num_beams} beams; "
                "raise num_beams, or set do_sample=True"
            )
        if wrong:
            raise ValueError("; ".join(wrong) + ".")

    @classmethod
    def typed(cls, name: str, value: Any) -> Any:
        """The value of an option as Python's own of its type; of None, the option's default.

        Raises:
          ValueError: it is of another kind, as 2.5 beams.
        """
        default = getattr(cls, name)
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy's, JAX's, PyTorch's
            value = value.item()
        if value is None:
            return default
        kind, number = type(default), isinstance(value, (int, float)) and math.isfinite(value)
        if kind is bool and number and value in (0, 1):
            return bool(value)
        if kind in (int, float) and number and not isinstance(value, bool):
            if kind is float or value == int(value):
                return kind(value)
        must = {bool: "True or False", int: "a whole number", float: "a finite number"}
        raise ValueError(f"{name} is {value!r}; it must be {must[kind]}.")

    def _at_most(self, other: str, least: int) -> Callable[[int], bool]:
        return lambda x: least <= x <= getattr(self, other)

    @property
    def num_sequences(self) -> int:
        """W: sequences (beams or samples) of a prompt that are generated side by side."""
        return self.num_return_sequences if self.do_sample else self.num_beams


def changed(default: Decoding, changes: dict[str, Any]) -> Decoding:
    """The default decoding with some of its fields changed; None leaves one as it is.

    Raises:
      TypeError: there is no such field.
      ValueError: values that cannot be, or do not go together.
    """
    check_names(changes, [field.name for field in dataclasses.fields(Decoding)])
    changes = {
        name: Decoding.typed(name, value) for name, value in changes.items() if value is not None
    }
    if changes.get("do_sample"):
        changes = {"num_beams": 1, **changes}
    if changes.get("max_new_tokens", default.max_new_tokens) < default.min_new_tokens:
        changes = {"min_new_tokens": 0, **changes}
    return dataclasses.replace(default, **changes)


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Refuses names of options that there are not: TypeError, with the one that was meant."""
    for name in given:
        if name not in known:
            near = did_you_mean(name, known, SYNONYMS)
            raise TypeError(f"No option {name}.{near} There are {', '.join(known)}.")
