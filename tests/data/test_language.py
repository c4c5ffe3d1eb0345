"""What a language model's texts begin and end with is said by its config; a tokenizer gives ids."""

import dataclasses

import pytest
import tokenizers as rust
import transformers

from blip2_jax.data import language, tokenizers
from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.t5 import T5Config


def words(*extra, **special):
    """A tokenizer of a few words that drops white space, with special tokens as given."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "a", "red", "blue", *extra])}
    model = rust.Tokenizer(rust.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = rust.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", **special
    )


@pytest.fixture(scope="module")
def opt():
    return tokenizers.load("package:digits-opt")


def test_an_opt_ends_by_a_newline_unless_its_config_says_otherwise(opt):
    newline = language.token_of(opt, "\n")
    assert opt.decode([newline]) == "\n"
    assert language.end_ids(opt, OPTConfig()) == (newline,)
    assert language.end_ids(opt, OPTConfig(eos_token_ids=(7, 9))) == (7, 9)
    assert language.end_ids(opt, LlamaConfig()) == language.end_ids(opt, LlamaConfig()) == (2,)
    assert language.end_ids(opt, T5Config()) == (1,)
    assert language.end_ids(opt, LlamaConfig(eos_token_ids=())) == (opt.eos_token_id,)


def test_the_end_that_is_taught_is_the_end_that_is_waited_for(opt):
    newline = language.token_of(opt, "\n")
    for llm, text, ids in (
        (OPTConfig(), "", (newline,)),
        (OPTConfig(), "</s>", (2,)),
        (LlamaConfig(), "", (2,)),
        (LlamaConfig(), "\n", (newline,)),
        (LlamaConfig(eos_token_ids=(5, 2)), "</s>", (2, 5)),
        (T5Config(eos_token_ids=(2,)), "</s>", (2,)),
    ):
        assert language.with_end(opt, llm, text).eos_token_ids == ids
    with pytest.raises(ValueError, match="end_of_text is '\\\\n', but .* an encoder-decoder"):
        language.with_end(opt, T5Config(), "\n")


def test_an_end_that_is_no_token_is_refused():
    for text in ("\n", "###", "red blue"):
        with pytest.raises(ValueError, match="is no token of this tokenizer"):
            language.token_of(words(), text)
    assert language.token_of(words("</s>"), "</s>") == 4
    with pytest.raises(ValueError, match=r"end_of_text .*generation_config\.json"):
        language.end_ids(words(), OPTConfig())
    assert language.end_ids(words(), OPTConfig(eos_token_ids=(3,))) == (3,)
    with pytest.raises(ValueError, match="names an end token"):
        language.end_ids(words(), LlamaConfig(eos_token_ids=()))


def test_a_text_begins_as_the_tokenizer_begins_it_or_else_as_the_config_says(opt):
    assert language.begin_ids(opt, OPTConfig(bos_token_id=9)) == [opt.bos_token_id]
    for tokenizer in (words(), words("<s>", bos_token="<s>")):  # has none, or does not put it there
        assert language.begin_ids(tokenizer, LlamaConfig()) == [1]
        assert language.begin_ids(tokenizer, LlamaConfig(bos_token_id=None)) == []


def test_padding_is_the_configs_and_inside_the_embeddings(opt):
    assert language.pad_id(opt, OPTConfig(pad_token_id=5)) == 5
    assert language.pad_id(opt, OPTConfig(pad_token_id=None)) == opt.pad_token_id
    assert language.pad_id(opt, LlamaConfig(pad_token_id=32000)) == opt.pad_token_id  # no such row
    assert language.pad_id(words(), LlamaConfig()) == 0


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(opt):
    language.check_vocabulary(opt, len(opt), "language model")
    with pytest.raises(ValueError, match=rf"have {len(opt) - 1} rows, and .* {len(opt)} tokens"):
        language.check_vocabulary(opt, len(opt) - 1, "language model")
    grown = tokenizers.load("package:digits-opt")
    grown.add_tokens(["<image>"])  # never read: the processor's place of the queries
    language.check_vocabulary(grown, len(opt), "language model")
    grown.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="'<extra>' is the first without a row.*resize"):
        language.check_vocabulary(grown, len(opt), "Q-Former")


def test_configs_of_the_families_have_what_texts_need():
    for llm in (OPTConfig(), LlamaConfig(), T5Config()):
        for name in ("vocab_size", "bos_token_id", "eos_token_ids", "pad_token_id", "end_of_text"):
            assert hasattr(llm, name)
        assert dataclasses.replace(llm, eos_token_ids=(5,)).eos_token_ids == (5,)
    kinds = (OPTConfig, LlamaConfig, T5Config)
    assert [llm.family for llm in kinds] == ["opt", "llama", "t5"]
    assert [llm.is_encoder_decoder for llm in kinds] == [False, False, True]
    assert [llm.padding_side for llm in kinds] == ["left", "left", "right"]
