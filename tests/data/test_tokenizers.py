"""Texts as arrays: the shipped tokenizers, and what is padded, cut, masked and learned."""

import copy

import numpy as np
import pytest
import transformers

import tests.data.made as made
from blip2_jax.data import language, tokenizers
from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.weights import lavis


@pytest.fixture(scope="module")
def bert():
    return tokenizers.load("package:digits-bert")


@pytest.fixture(scope="module")
def opt():
    return tokenizers.load("package:digits-opt")


def test_special_tokens(bert, opt):
    assert bert.pad_token_id == 0
    assert bert.bos_token == "[DEC]" and bert.bos_token_id == len(bert) - 1
    assert (opt.pad_token_id, opt.bos_token_id, opt.eos_token_id) == (1, 2, 2)
    assert opt.decode([language.token_of(opt, "\n")]) == "\n"


def test_qformer_text_is_framed_cut_and_padded(bert):
    ids, mask = tokenizers.encode_qformer(bert, ["a red 3", "a red 3 and a blue 7"], 6)
    assert ids.shape == mask.shape == (2, 6) and ids.dtype == np.int32
    assert ids[0, 0] == bert.cls_token_id and ids[0, 4] == bert.sep_token_id
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert ids[1, 5] == bert.sep_token_id  # cut text still ends


def test_caption_labels(opt):
    ids, mask, labels = tokenizers.encode_captions(opt, OPTConfig(), ["a red 3"], 8)
    newline = language.token_of(opt, "\n")
    assert ids[0, 0] == opt.bos_token_id and ids[0, 4] == newline
    assert mask[0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert labels[0, :5].tolist() == ids[0, :5].tolist()  # BOS included, as in LAVIS
    assert (labels[0, 5:] == tokenizers.IGNORED).all()


def test_a_prompt_is_not_learned(opt):
    ids, _, labels = tokenizers.encode_captions(
        opt, OPTConfig(), ["red 3"], 8, prompt="a picture of a"
    )
    learned = opt.decode(ids[0][labels[0] != tokenizers.IGNORED])
    assert learned == " red 3\n"


def test_the_end_is_the_models(opt):
    ids, _, labels = tokenizers.encode_captions(opt, LlamaConfig(), ["red 3"], 8)
    assert opt.decode(ids[0][labels[0] != tokenizers.IGNORED]) == "</s>red 3</s>"


def test_a_caption_and_its_prompt_are_one_text_that_loses_its_end(opt):
    """LAVIS `blip2_opt.py`: one call of the tokenizer; as many tokens as the prompt has alone."""
    text = "a picture of a red 3 and a blue 7\n"
    whole = [opt.bos_token_id, *opt(text, add_special_tokens=False)["input_ids"]]
    for prompt in ("a picture of", "a picture of "):
        for length in (6, 20):
            ids, mask, labels = tokenizers.encode_captions(
                opt, OPTConfig(), ["a red 3 and a blue 7"], length, prompt
            )
            assert ids[0][mask[0] > 0].tolist() == whole[:length]
            assert labels[0][mask[0] > 0].tolist() == [-100] * 4 + whole[4:length]


def cut_by_itself(tokenizer, text, length, side):
    """What transformers' own truncation leaves."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = side
    return tokenizer(text, truncation=True, max_length=length)["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_cut_as_transformers_cuts_them(bert, opt, side):
    for tokenizer in (bert, opt, t5_tokenizer(), made.llama_tokenizer("prepend")):
        for text in ("a red 3 and a blue 7", "a red", ""):
            for length in (3, 6, 40):
                (row,) = tokenizers.tokenize(tokenizer, [text], length, truncation_side=side)
                assert row == cut_by_itself(tokenizer, text, length, side)


def test_cutting_leaves_the_tokenizer_as_it_is(bert):
    """Threads share it."""
    tokenizers.tokenize(bert, ["a red 3 and a blue 7"], 4, truncation_side="left")
    assert bert.truncation_side == "right" and bert.backend_tokenizer.truncation is None


def test_the_qformers_text_is_cut_where_lavis_cuts_it(bert):
    for side, kept in (("right", "a red 3 and"), ("left", "and a blue 7")):
        ids, mask = tokenizers.encode_qformer(
            bert, ["a red 3 and a blue 7"], 6, truncation_side=side
        )
        assert bert.decode(ids[0][1:-1]) == kept and mask.all()


def t5_tokenizer():
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *(f"▁{word}" for word in (*made.WORDS, "a", "red", "and")),
    ]
    return transformers.T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0
    )


QUESTION = "Question: what color is the 3? Short answer:"


@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
@pytest.mark.parametrize("answer", ["light blue", "7", "blue 7 light blue 7", "?"])
@pytest.mark.parametrize(("prompt_length", "length"), [(30, 20), (4, 3)])
def test_an_answer_has_lavis_ids(kind, answer, prompt_length, length):
    """LAVIS `blip2_vicuna_instruct.py`: two texts, cut apart, joined without the second's BOS."""
    tokenizer = made.llama_tokenizer(kind)
    prompt = cut_by_itself(tokenizer, QUESTION, prompt_length, "left")
    reply = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id][:length][1:]
    ids, mask, labels = tokenizers.encode_answers(
        tokenizer, LlamaConfig(), [QUESTION], [answer], prompt_length, length
    )
    assert ids.shape == mask.shape == labels.shape == (1, prompt_length + length)
    assert ids[0][mask[0] > 0].tolist() == prompt + reply
    assert labels[0][mask[0] > 0].tolist() == [-100] * len(prompt) + reply
    assert (labels[0][mask[0] == 0] == tokenizers.IGNORED).all()


@pytest.mark.parametrize("kind", ["metaspace", "prepend", "bytes", "opt"])
@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_an_answer_begins_a_word_whatever_the_tokenizer(kind, space, opt):
    """Its tokens are those that it has within the whole text."""
    tokenizer = opt if kind == "opt" else made.llama_tokenizer(kind)
    prompt, answer = (f"the 3 is{space}", "blue 7")
    ids, _, labels = tokenizers.encode_answers(tokenizer, OPTConfig(), [prompt], [answer], 20, 20)
    learned = ids[0][labels[0] != tokenizers.IGNORED]
    pieces = "".join(tokenizer.convert_ids_to_tokens(learned))
    text = pieces.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
    begins = "" if space and kind in ("bytes", "opt") else " "
    assert text == f"{begins}blue 7\n"


def test_a_long_question_does_not_take_its_answers_place(opt):
    asked = "Question: " + "is the 3 red and " * 30 + "is the 7 blue? Answer:"
    ids, mask, labels = tokenizers.encode_answers(opt, OPTConfig(), [asked], ["yes"], 8, 4)
    assert opt.decode(ids[0][labels[0] != tokenizers.IGNORED]) == " yes\n"
    assert opt.decode(ids[0][mask[0] > 0]) == "</s> is the 7 blue? Answer: yes\n"
    t5 = t5_tokenizer()
    ids, mask, labels = tokenizers.encode_prefix(
        t5, ["a red 3 and a blue 7"], ["light blue 7"], 4, 3, truncation_side="left"
    )
    assert ids.tolist() == [t5("a blue 7")["input_ids"]] and mask.all()
    assert labels.tolist() == [t5("light blue")["input_ids"]]


@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
def test_special_tokens_are_lavis_when_a_config_says_so(kind, tmp_path):
    made.llama_tokenizer(kind).save_pretrained(tmp_path)
    own, theirs = (tokenizers.load(str(tmp_path), t) for t in (None, lavis.LLAMA_TOKENS))
    assert (own.bos_token_id, own.eos_token_id, own.unk_token_id) == (1, 2, 0)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (2, 2, 2)
    first, *rest = own(QUESTION)["input_ids"]
    assert first == 1 and theirs(QUESTION)["input_ids"] == [2, *rest]
    assert len(theirs) == len(own)  # no row that the embedding lacks
    with pytest.raises(ValueError, match=r"no token '<end>', which is to be its eos_token"):
        tokenizers.load(str(tmp_path), {"eos_token": "<end>"})


def test_prompts_are_padded_on_the_left(opt):
    rows = tokenizers.tokenize(opt, ["", "a red"])
    ids, mask = tokenizers.pad_rows(opt, rows, 3, side="left")
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert ids[0, 2] == ids[1, 0] == opt.bos_token_id and ids[0, 0] == opt.pad_token_id


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        tokenizers.load(str(tmp_path / "nowhere"))
