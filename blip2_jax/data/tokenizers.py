"""Tokenizers of the Q-Former (BERT's kind) and of the LLM (OPT's kind), and texts as arrays.

They are folders as transformers saves them; `package:NAME` is one that ships with the package.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from blip2_jax.data.language import LanguageConfig, begin_ids, end_ids, missing_begin, pad_id
from blip2_jax.runtime import digest as hashing

PACKAGE = "package:"
TOKENIZER_CONFIG = "tokenizer_config.json"  # every tokenizer that transformers saved has one
IGNORED = -100  # a label that no loss counts (torch's convention)
BOS_OF_QFORMER = "[DEC]"  # begins generated text (LAVIS `blip2.py`)

# Marks in front of a token that begins a word (SentencePiece, byte-level BPE).
WORD_MARKS = ("\u2581", "\u0120")


def load(source: str, special_tokens: Mapping[str, str] | None = None) -> Any:
    """The tokenizer in a folder, in the package (`package:NAME`), or under its name on the hub.

    Args:
      source: folder or name.
      special_tokens: names of special tokens ("bos_token") -> tokens of the vocabulary, where they
        are others than the source's own.

    Raises:
      ValueError: no tokenizer there, or a special token that it does not have.
    """
    from transformers import AutoTokenizer  # seconds of import, only where texts are read

    folder = _folder(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=folder.is_dir())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer in {source!r}: it is no folder with tokenizer.json, as transformers' "
            "save_pretrained writes it, nor can it be had from the Hugging Face hub under this "
            "name."
        ) from error
    if special_tokens:
        _set_special_tokens(tokenizer, special_tokens, source)
    return tokenizer


def at_hand(source: str, special_tokens: Mapping[str, str] | None = None) -> Any | None:
    """What `load` gives, if it is on this machine: nothing is fetched from the hub; else None."""
    if not source:
        return None
    if source.startswith(PACKAGE) or Path(source).is_dir():
        is_here = (_folder(source) / TOKENIZER_CONFIG).is_file()
    else:
        from huggingface_hub import try_to_load_from_cache

        is_here = isinstance(try_to_load_from_cache(source, TOKENIZER_CONFIG), str)
    return load(source, special_tokens) if is_here else None


def _folder(source: str) -> Path:
    if source.startswith(PACKAGE):
        return Path(str(resources.files("blip2_jax") / "assets" / source.removeprefix(PACKAGE)))
    return Path(source)


def _set_special_tokens(tokenizer: Any, special_tokens: Mapping[str, str], source: str) -> None:
    vocabulary = tokenizer.get_vocab()
    for name, token in special_tokens.items():
        if token not in vocabulary:
            raise ValueError(
                f"The tokenizer in {source!r} has no token {token!r}, which is to be its {name}; "
                "it is another than the one that the model was trained with."
            )
    begins = tokenizer.bos_token_id in tokenizer("")["input_ids"]
    tokenizer.add_special_tokens(dict(special_tokens))
    if begins:
        tokenizer.add_bos_token = True  # texts begin with the new one: its template is made again


# ----------------------------------------------------------------------------------- encoding


def pad(
    sequences: Sequence[Sequence[float]],
    length: int,
    fill: float,
    dtype: Any = np.int32,
    side: str = "right",
) -> np.ndarray:
    """Rows of numbers as an array [rows, length]: cut on the right, filled on `side`."""
    out = np.full((len(sequences), length), fill, dtype)
    for row, values in zip(out, sequences, strict=True):
        values = values[:length]
        if side == "right":
            row[: len(values)] = values
        else:
            row[length - len(values) :] = values
    return out


def encode_qformer(
    tokenizer: Any, texts: Sequence[str], length: int, *, truncation_side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] text [SEP], cut and right-padded: ids and mask, int32[B, length].

    LAVIS cuts captions on the right (`blip2_qformer.py`) and instructions on the left
    (`blip2_vicuna_instruct.py`).
    """
    token_ids = tokenize(tokenizer, texts, length, truncation_side=truncation_side)
    return pad_rows(tokenizer, token_ids, length, side="right")


def encode_captions(
    tokenizer: Any, llm: LanguageConfig, texts: Sequence[str], length: int, prompt: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stage 2's text for a decoder-only LLM: BOS, prompt, text, end; right-padded.

    Args:
      tokenizer: the LLM's.
      llm: its config, which says how texts begin and end.
      texts: what is to be learned.
      length: S; what is longer is cut on the right (LAVIS `blip2_opt.py`).
      prompt: stands before every text, a space between them.

    Returns:
      ids, mask and labels, int32[B, length]. Labels are the ids, and -100 at padding and, where
      there is a prompt, at BOS and prompt; without a prompt BOS is a label (LAVIS
      `blip2_opt.py`). A text that is too long loses its end, not its place.
    """
    prompt = prompt.rstrip(" ")
    begin = begin_ids(tokenizer, llm)
    # One text, as in LAVIS; the prompt is as many of its tokens as it has alone.
    space = " " if prompt and not prompt[-1].isspace() else ""
    bodies = _ended(tokenizer, llm, [f"{prompt}{space}{text}" for text in texts])
    hidden = len(begin) + len(_ids(tokenizer, [prompt])[0]) if prompt else 0
    return _labelled(tokenizer, llm, [(begin + body, hidden) for body in bodies], length)


def encode_answers(
    tokenizer: Any,
    llm: LanguageConfig,
    prompts: Sequence[str],
    answers: Sequence[str],
    prompt_length: int,
    length: int,
    *,
    end: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Questions with answers for a decoder-only LLM: BOS, prompt, answer, end; right-padded.

    Prompt and answer are tokenized and cut apart, so that no prompt, however long, takes the
    answer's place (LAVIS `blip2_vicuna_instruct.py`).

    Args:
      tokenizer: the LLM's.
      llm: its config, which says how texts begin and end.
      prompts: with the question in them.
      answers: what is to be learned; their first word begins a word.
      prompt_length: tokens of a prompt, BOS included; a longer one is cut on the left, behind BOS.
      length: tokens of an answer, its end and, as LAVIS counts, one BOS included; a longer one is
        cut on the right.
      end: False leaves answers open, as where LAVIS ranks them.

    Returns:
      ids, mask and labels, int32[B, prompt_length + length]; labels are -100 at padding, BOS and
      prompt.
    """
    begin = begin_ids(tokenizer, llm)
    room = prompt_length - len(begin)
    heads = [begin + ids[max(0, len(ids) - room) :] for ids in _ids(tokenizer, prompts)]
    texts = [
        f"{_space(tokenizer, prompt, answer)}{answer}"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    replies = _ended(tokenizer, llm, texts) if end else _ids(tokenizer, texts)
    bodies = [ids[: length - len(begin)] for ids in replies]
    sequences = [(head + body, len(head)) for head, body in zip(heads, bodies, strict=True)]
    return _labelled(tokenizer, llm, sequences, prompt_length + length)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _space(tokenizer: Any, prompt: str, answer: str) -> str:
    """What stands between the two; SentencePiece puts a space before every text by itself."""
    first = tokenizer.convert_ids_to_tokens(_ids(tokenizer, [answer])[0][:1])
    marked = bool(first) and first[0].startswith(WORD_MARKS)
    return "" if marked or prompt[-1:].isspace() else " "


def _ended(tokenizer: Any, llm: LanguageConfig, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts with the token that ends them."""
    last = end_ids(tokenizer, llm)[0]
    return [[*ids, last] for ids in _ids(tokenizer, texts)]


def _labelled(
    tokenizer: Any, llm: LanguageConfig, sequences: Sequence[tuple[list[int], int]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, each with the number of tokens at its start that are not learned, as arrays."""
    ids = pad([row for row, _ in sequences], length, pad_id(tokenizer, llm))
    mask = pad([[1] * len(row) for row, _ in sequences], length, 0)
    labels = [[IGNORED] * hidden + row[hidden:] for row, hidden in sequences]
    return ids, mask, pad(labels, length, IGNORED)


def encode_prefix(
    tokenizer: Any,
    prefixes: Sequence[str],
    suffixes: Sequence[str],
    prefix_length: int,
    length: int,
    *,
    truncation_side: str = "right",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stage 2's text for an encoder-decoder LLM; right-padded.

    Args:
      tokenizer: the LLM's.
      prefixes: what its encoder reads.
      suffixes: what its decoder learns; cut on the right.
      prefix_length, length: tokens of them, `</s>` included.
      truncation_side: where prefixes are cut: LAVIS's `blip2_t5.py` cuts captions and their prompt
        on the right, its `blip2_t5_instruct.py` instructions on the left.

    Returns:
      ids and mask of the encoder's text, int32[B, prefix_length]; labels of the decoder's,
      int32[B, length]. Both texts end in `</s>`; labels are -100 at padding.
    """
    token_ids = tokenize(tokenizer, prefixes, prefix_length, truncation_side=truncation_side)
    ids, mask = pad_rows(tokenizer, token_ids, prefix_length, side="right")
    return ids, mask, pad(tokenize(tokenizer, suffixes, length), length, IGNORED)


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    truncate: int | None = None,
    *,
    truncation_side: str = "right",
    llm: LanguageConfig | None = None,
) -> list[list[int]]:
    """Ids of texts with the tokenizer's own special tokens.

    Args:
      tokenizer: OPT's and Llama's begin a text with BOS, T5's ends it with EOS, BERT's does both.
      texts: any number.
      truncate: the most tokens of a text, special ones included; longer ones are cut. The special
        ones stay.
      truncation_side: "left" or "right".
      llm: the config of a language model, whose BOS is put where the tokenizer puts none.
    """
    # Not by the tokenizer: it keeps length and side as its state, which threads share.
    encoded = tokenizer(list(texts), return_special_tokens_mask=True, verbose=False)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    begin = [] if llm is None else missing_begin(tokenizer, llm)
    marks = [1] * len(begin)
    return [_cut(begin + ids, marks + special, truncate, truncation_side) for ids, special in pairs]


def _cut(ids: list[int], special: list[int], length: int | None, side: str) -> list[int]:
    if length is None or len(ids) <= length:
        return ids
    start = next((i for i, mark in enumerate(special) if not mark), 0)
    stop = len(ids) - next((i for i, mark in enumerate(reversed(special)) if not mark), 0)
    room = max(0, length - start - (len(ids) - stop))
    kept = ids[stop - room : stop] if side == "left" else ids[start : start + room]
    return [*ids[:start], *kept, *ids[stop:]]


def pad_rows(
    tokenizer: Any,
    token_ids: Sequence[Sequence[int]],
    length: int,
    *,
    side: str,
    llm: LanguageConfig | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as arrays: ids and mask, int32[B, length].

    Args:
      tokenizer: gives the id of the padding.
      token_ids: see `tokenize`.
      length: of the arrays; at least that of the longest row.
      side: of the padding; see `language.LanguageConfig`. "right" for a Q-Former.
      llm: the config of a language model, None for a Q-Former.
    """
    mask = pad([[1] * len(row) for row in token_ids], length, 0, side=side)
    return pad(token_ids, length, pad_id(tokenizer, llm), side=side), mask


PROBE = (
    "A photo of two Dogs, at 10:30 -- isn't it?\n Question: how many?  Answer: 3.5\tred-blue "
    "caf\u00e9 \u4f60\u597d \u00bd <s> </s> [MASK] <image>"
)


def digest(tokenizer: Any) -> str:
    """A hash of what decides a tokenizer's ids, the same wherever it lies.

    Its vocabulary, its merges where it has some, its special tokens, and what it makes of a text of
    many kinds of characters, which shows how it normalizes and cuts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    content = [
        sorted(tokenizer.get_vocab().items()),
        model.get("merges"),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        tokenizer(PROBE)["input_ids"],
    ]
    return hashing.of_text(json.dumps(content))
