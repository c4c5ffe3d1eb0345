"""The two tokenizers that ship with the package, and how they are trained."""

import re

import numpy as np
import pytest

from blip2_jax.data import tokenizers
from blip2_jax.digits import stories
from blip2_jax.digits import tokenizers as training


@pytest.fixture(scope="module")
def bert():
    return tokenizers.load("package:digits-bert")


@pytest.fixture(scope="module")
def opt():
    return tokenizers.load("package:digits-opt")


def corpus(n=300):
    rng = np.random.default_rng(5)
    return [text for _ in range(n) for text in stories.story(rng) if text]


def test_the_vocabularies_hold_every_word_of_the_world(bert, opt):
    for text in corpus():
        assert bert.unk_token_id not in bert(text)["input_ids"]
        ids = opt(text, add_special_tokens=False)["input_ids"]
        assert opt.decode(ids) == text
        assert len(ids) == len(re.findall(r"\w+|[?:,]", text))  # whole words, single digits


def test_training_them_again_gives_working_ones(tmp_path):
    texts = corpus(200)
    bert = training.train_qformer_tokenizer(texts)
    opt = training.train_lm_tokenizer([f"{text}\n" for text in texts])
    assert (bert.bos_token, bert.bos_token_id) == ("[DEC]", len(bert) - 1)  # as LAVIS adds it
    for name, tokenizer in (("bert", bert), ("opt", opt)):
        tokenizer.save_pretrained(tmp_path / name)
        again = tokenizers.load(str(tmp_path / name))
        assert again("a red 3")["input_ids"] == tokenizer("a red 3")["input_ids"]
