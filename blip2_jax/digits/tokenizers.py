"""Training of the embedded world's two tokenizers, which ship with the package.

    python -m blip2_jax.digits.tokenizers

The two are of different kinds on purpose, as in the published models.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from blip2_jax.data.tokenizers import BOS_OF_QFORMER
from blip2_jax.digits import stories, world


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
    vocabulary = sorted(ids, key=ids.__getitem__)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
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
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for _ in range(3000):
        texts += filter(None, stories.story(rng))
        texts += world.captions(world.sample_scene(rng), rng, 3)
    train_qformer_tokenizer(texts).save_pretrained(assets / "digits-bert")
    train_lm_tokenizer(f"{text}\n" for text in texts).save_pretrained(assets / "digits-opt")


if __name__ == "__main__":
    train_package_tokenizers(Path(__file__).parents[1] / "assets")
