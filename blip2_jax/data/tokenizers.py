"""Tokenizers of the Q-Former (BERT's kind) and of the LLM (OPT's kind), and texts as arrays.

The embedded world's own two are trained here and ship with the package; all others are folders as
transformers saves them. The two are different on purpose, as in the published models.
"""

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "package:"
IGNORED = -100  # a label that no loss counts (torch's convention)
BOS_OF_QFORMER = "[DEC]"  # begins generated text (LAVIS `blip2.py`)

# Weights of a story's tokens in the language model's pre-training. What cannot be foreseen (the
# description of a scene nobody has seen, the choice of a question) teaches little.
UNFORESEEN, RETOLD, ANSWER = 0.1, 0.5, 1.0
BOS = ""  # in a list of pieces of text, the token that begins a text


def load(source: str) -> Any:
    """The tokenizer in a folder, in the package (`package:NAME`), or under its name on the hub."""
    from transformers import AutoTokenizer  # seconds of import, only where texts are read

    folder = Path(source)
    if source.startswith(PACKAGE):
        folder = Path(str(resources.files("blip2_jax") / "assets" / source.removeprefix(PACKAGE)))
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=folder.is_dir())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer in {source!r}: it is no folder with tokenizer.json, as transformers' "
            "save_pretrained writes it, nor can it be had from the Hugging Face hub under this "
            "name."
        ) from error


# ----------------------------------------------------------------------------------- training


def train_qformer_tokenizer(texts: Iterable[str]) -> Any:
    """A WordPiece tokenizer whose words are those of `texts`; specials as in BERT, [DEC] last."""
    import tokenizers
    from transformers import BertTokenizer

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=specials, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    ids = model.get_vocab()
    words = sorted(ids, key=ids.__getitem__)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.add_special_tokens({"bos_token": BOS_OF_QFORMER})
    return tokenizer


def train_lm_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer like OPT's: `</s>` begins a text, a newline ends it."""
    import tokenizers
    from transformers import GPT2Tokenizer

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=["Ċ"],  # the newline, as byte-level BPE writes it
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    import json

    trained = json.loads(model.to_str())["model"]
    merges: Any = [tuple(pair) for pair in trained["merges"]]  # the hint there asks for texts
    return GPT2Tokenizer(
        vocab=trained["vocab"],
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )


def train_package_tokenizers(assets: Path) -> None:
    """Trains the embedded world's two tokenizers and saves them where the package ships them."""
    from blip2_jax.data import world

    rng = np.random.default_rng(0)
    texts: list[str] = []
    for _ in range(3000):
        texts += filter(None, world.story(rng))
        texts += world.captions(world.sample_scene(rng), rng, 3)
    train_qformer_tokenizer(texts).save_pretrained(assets / "digits-bert")
    train_lm_tokenizer(f"{text}\n" for text in texts).save_pretrained(assets / "digits-opt")


# ----------------------------------------------------------------------------------- encoding


def _pad(
    rows: Sequence[Sequence[float]],
    length: int,
    fill: float,
    dtype: Any = np.int32,
    side: str = "right",
) -> np.ndarray:
    out = np.full((len(rows), length), fill, dtype)
    for row, values in zip(out, rows, strict=True):
        values = values[:length]
        if side == "right":
            row[: len(values)] = values
        else:
            row[length - len(values) :] = values
    return out


def newline_id(tokenizer: Any) -> int:
    """The token that ends a generated text (OPT: 50118)."""
    return tokenizer("\n", add_special_tokens=False)["input_ids"][0]


def encode_qformer(
    tokenizer: Any, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] text [SEP], cut and right-padded: ids and mask, int32[B, length]."""
    return pad_rows(tokenizer, tokenize(tokenizer, texts, length), length, side="right")


def encode_captions(
    tokenizer: Any, texts: Sequence[str], length: int, prompt: str = "", end: str = "\n"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stage 2's text for a decoder-only LLM: BOS, prompt, text, end; right-padded.

    Args:
      tokenizer: the LLM's.
      texts: what is to be learned.
      length: S; what is longer is cut.
      prompt: stands before every text.
      end: ends every text: a newline for OPT (LAVIS), "" for the tokenizer's own end token.

    Returns:
      ids, mask and labels, int32[B, length]. Labels are the ids, and -100 at padding and, where
      there is a prompt, at BOS and prompt; without a prompt BOS is a label (LAVIS
      `blip2_opt.py`). A text that is too long loses its end, not its place.
    """
    head = [tokenizer.bos_token_id]
    if prompt:
        head += tokenizer(prompt, add_special_tokens=False)["input_ids"]
    space = " " if prompt else ""
    lines = [f"{space}{text}{end}" for text in texts]
    bodies = tokenizer(lines, add_special_tokens=False)["input_ids"]
    if not end:
        bodies = [[*body, tokenizer.eos_token_id] for body in bodies]
    hidden = [IGNORED] * len(head) if prompt else head
    ids = _pad([head + body for body in bodies], length, pad_id(tokenizer))
    mask = _pad([[1] * (len(head) + len(body)) for body in bodies], length, 0)
    return ids, mask, _pad([hidden + body for body in bodies], length, IGNORED)


def is_encoder_decoder(tokenizer: Any) -> bool:
    """Whether a tokenizer is T5's kind: no begin token, `</s>` after every text."""
    return tokenizer.bos_token_id is None


def encode_prefix(
    tokenizer: Any, prefixes: Sequence[str], suffixes: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stage 2's text for an encoder-decoder LLM (LAVIS `blip2_t5.py`); right-padded.

    Returns:
      ids and mask of the encoder's text, labels of the decoder's, int32[B, length] each. Both
      texts end in `</s>`; labels are -100 at padding.
    """
    texts = [list(prefixes), list(suffixes)]
    ids, labels = (
        tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts
    )
    mask = _pad([[1] * len(row) for row in ids], length, 0)
    return _pad(ids, length, tokenizer.pad_token_id), mask, _pad(labels, length, IGNORED)


def tokenize(tokenizer: Any, texts: Sequence[str], truncate: int | None = None) -> list[list[int]]:
    """Ids of texts with the tokenizer's own special tokens.

    Args:
      tokenizer: OPT's and Llama's begin a text with BOS, T5's ends it with EOS, BERT's does both.
      texts: any number.
      truncate: the most tokens of a text, special ones included; longer ones are cut.
    """
    cut = {} if truncate is None else {"truncation": True, "max_length": truncate}
    return tokenizer(list(texts), **cut)["input_ids"]


def pad_rows(
    tokenizer: Any, rows: Sequence[Sequence[int]], length: int, *, side: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as arrays: ids and mask, int32[B, length].

    Args:
      tokenizer: gives the id of the padding.
      rows: see `tokenize`.
      length: of the arrays; at least that of the longest row.
      side: of the padding: "left" for prompts of decoder-only models, "right" for all others.
    """
    mask = _pad([[1] * len(row) for row in rows], length, 0, side=side)
    return _pad(rows, length, pad_id(tokenizer), side=side), mask


def pad_id(tokenizer: Any) -> int:
    """What fills up rows; some Llamas' tokenizers name none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def encode_stories(
    tokenizer: Any, stories: Sequence[Sequence[str]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stories (`world.story`) for a language model: every segment is BOS, text, newline.

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
    rows: list[list[int]] = [[] for _ in stories]
    weights: list[list[float]] = [[] for _ in stories]
    for (number, text, weight), ids in zip(pieces, encoded, strict=True):
        ids = [tokenizer.bos_token_id] if text == BOS else ids
        rows[number] += ids
        weights[number] += [weight] * len(ids)
    mask = _pad([[1] * len(row) for row in rows], length, 0)
    ids = _pad(rows, length, tokenizer.pad_token_id)
    return ids, mask, _pad(weights, length, 0.0, np.float32)


if __name__ == "__main__":
    train_package_tokenizers(Path(__file__).parents[1] / "assets")
