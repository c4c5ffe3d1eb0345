"""Texts as arrays: the shipped tokenizers, and what is padded, masked and learned."""

import re

import numpy as np
import pytest

from blip2_jax.data import tokenizers, world


@pytest.fixture(scope="module")
def bert():
    return tokenizers.load("package:digits-bert")


@pytest.fixture(scope="module")
def opt():
    return tokenizers.load("package:digits-opt")


def corpus(n=300):
    rng = np.random.default_rng(5)
    return [text for _ in range(n) for text in world.story(rng) if text]


def test_the_vocabularies_hold_every_word_of_the_world(bert, opt):
    for text in corpus():
        assert bert.unk_token_id not in bert(text)["input_ids"]
        ids = opt(text, add_special_tokens=False)["input_ids"]
        assert opt.decode(ids) == text
        assert len(ids) == len(re.findall(r"\w+|[?:,]", text))  # whole words, single digits


def test_special_tokens(bert, opt):
    assert bert.pad_token_id == 0
    assert bert.bos_token == "[DEC]" and bert.bos_token_id == len(bert) - 1
    assert (opt.pad_token_id, opt.bos_token_id, opt.eos_token_id) == (1, 2, 2)
    assert opt.decode([tokenizers.newline_id(opt)]) == "\n"


def test_training_them_again_gives_working_ones(tmp_path):
    texts = corpus(200)
    bert = tokenizers.train_qformer_tokenizer(texts)
    opt = tokenizers.train_lm_tokenizer([f"{text}\n" for text in texts])
    for name, tokenizer in (("bert", bert), ("opt", opt)):
        tokenizer.save_pretrained(tmp_path / name)
        again = tokenizers.load(str(tmp_path / name))
        assert again("a red 3")["input_ids"] == tokenizer("a red 3")["input_ids"]


def test_qformer_text_is_framed_cut_and_padded(bert):
    ids, mask = tokenizers.encode_qformer(bert, ["a red 3", "a red 3 and a blue 7"], 6)
    assert ids.shape == mask.shape == (2, 6) and ids.dtype == np.int32
    assert ids[0, 0] == bert.cls_token_id and ids[0, 4] == bert.sep_token_id
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert ids[1, 5] == bert.sep_token_id  # cut text still ends


def test_caption_labels(opt):
    ids, mask, labels = tokenizers.encode_captions(opt, ["a red 3"], 8)
    newline = tokenizers.newline_id(opt)
    assert ids[0, 0] == opt.bos_token_id and ids[0, 4] == newline
    assert mask[0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert labels[0, :5].tolist() == ids[0, :5].tolist()  # BOS included, as in LAVIS
    assert (labels[0, 5:] == tokenizers.IGNORED).all()


def test_a_prompt_is_not_learned(opt):
    ids, _, labels = tokenizers.encode_captions(opt, ["red 3"], 8, prompt="a picture of a")
    learned = opt.decode(ids[0][labels[0] != tokenizers.IGNORED])
    assert learned == " red 3\n"


def test_the_end_may_be_the_tokenizers_own(opt):
    ids, _, labels = tokenizers.encode_captions(opt, ["red 3"], 8, end="")
    assert opt.decode(ids[0][labels[0] != tokenizers.IGNORED]) == "</s>red 3</s>"


def test_prompts_are_padded_on_the_left(opt):
    rows = tokenizers.tokenize(opt, ["", "a red"])
    ids, mask = tokenizers.pad_rows(opt, rows, 3, side="left")
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert ids[0, 2] == ids[1, 0] == opt.bos_token_id and ids[0, 0] == opt.pad_token_id


def test_stories_weigh_answers_most(opt):
    story = ["a red 3", "Question: what color is the 3? Answer: red", "the 3 is red"]
    ids, mask, weights = tokenizers.encode_stories(opt, [story], 40)
    heavy = opt.decode(ids[0][weights[0] == tokenizers.ANSWER])
    assert heavy == " red"
    retold = opt.decode(ids[0][weights[0] == tokenizers.RETOLD])
    assert retold == "\n</s>the 3 is red\n"  # the newline after an answer, and the retelling
    assert (weights[0] > 0).tolist() == (mask[0] > 0).tolist()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        tokenizers.load(str(tmp_path / "nowhere"))
