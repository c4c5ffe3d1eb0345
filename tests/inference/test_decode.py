"""Decoding against transformers' `generate`, token for token; each row alone as in any batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip2_jax.inference.decode import decode
from blip2_jax.inference.decode_state import NO_LOG_PROB, Prompt
from blip2_jax.inference.options import Decoding
from blip2_jax.models.blip2 import LLMS
from blip2_jax.models.layers import unstack
from blip2_jax.weights import huggingface

pytestmark = pytest.mark.integration

EOS, PAD, VOCABULARY, LENGTH = 5, 1, 30, 12
SIZES = {
    "opt": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=32, dropout=0.0, init_std=0.3, bos_token_id=2,
    ),
    "llama": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.3, bos_token_id=2,
    ),
    "t5": dict(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, dropout_rate=0.0, initializer_factor=1.0,
        decoder_start_token_id=0, bos_token_id=2,
    ),
}  # fmt: skip
CLASSES = {
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
}
FAMILIES = [(family, seed) for family in SIZES for seed in range(3)]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda p: f"{p[0]}-{p[1]}")
def models(request, tmp_path_factory):
    """transformers' model and ours, with the same random weights."""
    family, seed = request.param
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[family]
    positions = {} if family == "t5" else {"max_position_embeddings": 60}
    config = config_class(
        vocab_size=VOCABULARY, eos_token_id=EOS, pad_token_id=PAD, **positions, **SIZES[family]
    )
    theirs = model_class(config)
    if family == "t5":  # transformers 5 ties what the config unties
        theirs.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn(VOCABULARY, 32))
    theirs.eval()
    folder = tmp_path_factory.mktemp(family)
    theirs.save_pretrained(folder)
    # A T5 of its own computes the tanh GELU; within BLIP-2 it would be the exact one.
    own = {"activation": "gelu_new"} if family == "t5" else {}
    sizes = huggingface.llm_config(str(folder), **own)

    def make(s):
        return LLMS[type(s)](s, dtype=jnp.float32, rngs=nnx.Rngs(0))

    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make(sizes))))
    params = unstack(huggingface.load(str(folder), sizes, abstract))
    listed = dataclasses.replace(sizes, scan=False)
    return theirs, (nnx.graphdef(nnx.eval_shape(lambda: make(listed))), params)


def prompts(left: bool = True):
    """Six prompts of unequal length, padded on the left (an encoder-decoder's: on the right)."""
    rng = np.random.default_rng(3)
    lengths = np.array([7, 3, 5, 1, 7, 6])[:, None]
    position = np.arange(7)
    mask = (position >= 7 - lengths if left else position < lengths).astype(np.int32)
    return np.where(mask > 0, rng.integers(6, VOCABULARY, mask.shape), PAD).astype(np.int32), mask


@functools.partial(jax.jit, static_argnames=("graph", "decoding", "pad"))
def run(graph, params, ids, mask, prefix, row, key, decoding: Decoding, pad: int):
    llm = nnx.merge(graph, params)
    prompt = Prompt(llm.embed(ids), mask, *prefix, row)
    return decode(llm, prompt, decoding, eos_ids=(EOS,), pad_id=pad, key=key)


def ours_of(ours, ids, mask, decoding: Decoding, pad: int = PAD):
    graph, params = ours
    # Before the first generated token an encoder-decoder's decoder has its start token only.
    prefix = (ids, mask)
    if "decoder" in params:
        prefix = (np.zeros((len(ids), 1), int), np.ones((len(ids), 1), int))
    row = np.arange(len(ids))
    return jax.device_get(
        run(graph, params, ids, mask, prefix, row, jax.random.key(0), decoding, pad)
    )


def theirs_of(model, ids, mask, decoding: Decoding):
    options = {
        name: getattr(decoding, name)
        for name in (
            "num_beams", "repetition_penalty", "no_repeat_ngram_size", "early_stopping",
            "num_return_sequences",
        )
    }  # fmt: skip
    if decoding.num_beams > 1:
        options["length_penalty"] = decoding.length_penalty
    if decoding.min_new_tokens:
        options["min_new_tokens"] = decoding.min_new_tokens
    prompt = {"input_ids": torch.tensor(ids)}
    before = 1 if model.config.is_encoder_decoder else ids.shape[1]
    if not decoding.penalties_include_prompt:  # as LAVIS asks
        prompt = {"inputs_embeds": model.get_input_embeddings()(prompt["input_ids"])}
        before = 0
    with torch.no_grad():
        output = model.generate(
            **prompt,
            attention_mask=torch.tensor(mask),
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        log_probs = model.compute_transition_scores(
            output.sequences, output.scores, output.get("beam_indices"), decoding.num_beams == 1
        ).numpy()
    out = output.sequences.numpy()[:, before:]
    want = np.full((len(out), decoding.max_new_tokens), PAD)
    want[:, : out.shape[1]] = np.where(out == EOS, PAD, out)
    generated = (np.cumsum(out == EOS, axis=1) - (out == EOS)) == 0
    scores = np.full(want.shape, NO_LOG_PROB)
    scores[:, : out.shape[1]] = np.where(generated, log_probs[:, : out.shape[1]], NO_LOG_PROB)
    shape = (len(ids), -1, decoding.max_new_tokens)
    return want.reshape(shape), scores.reshape(shape)


DECODINGS = [
    Decoding(LENGTH),
    Decoding(LENGTH, repetition_penalty=1.7),
    Decoding(LENGTH, min_new_tokens=6),
    *(
        Decoding(LENGTH, num_beams=beams, length_penalty=penalty, num_return_sequences=count)
        for beams, penalty, count in (
            (3, -1.0, 1),
            (3, 0.0, 3),
            (3, 1.0, 1),
            (5, -1.0, 1),
            (5, 0.0, 1),
            (5, 1.0, 5),
        )
    ),
    Decoding(LENGTH, min_new_tokens=6, num_beams=5, repetition_penalty=1.5),
    Decoding(LENGTH, num_beams=3, early_stopping=True),
    Decoding(LENGTH, no_repeat_ngram_size=2),
    Decoding(LENGTH, no_repeat_ngram_size=3, num_beams=3, num_return_sequences=3),
    Decoding(LENGTH, no_repeat_ngram_size=2, num_beams=4, repetition_penalty=0.8, min_new_tokens=9),
]
FROM_EMBEDDINGS = [
    Decoding(LENGTH, repetition_penalty=1.7, penalties_include_prompt=False),
    Decoding(
        LENGTH, num_beams=3, repetition_penalty=1.5, no_repeat_ngram_size=2,
        penalties_include_prompt=False,
    ),
]  # fmt: skip


def name_of(decoding: Decoding) -> str:
    default = Decoding(LENGTH)
    changed = {k: v for k, v in vars(decoding).items() if v != getattr(default, k)}
    return " ".join(f"{k}={v}" for k, v in changed.items()) or "greedy"


@pytest.mark.parametrize("decoding", DECODINGS + FROM_EMBEDDINGS, ids=name_of)
def test_tokens_and_scores_equal_those_of_transformers(models, decoding):
    theirs, ours = models
    if theirs.config.is_encoder_decoder and not decoding.penalties_include_prompt:
        pytest.skip("its decoder is given no embeddings")
    ids, mask = prompts(left=not theirs.config.is_encoder_decoder)
    got = ours_of(ours, ids, mask, decoding)
    if decoding.penalties_include_prompt and not decoding.no_repeat_ngram_size:
        tokens, log_probs = theirs_of(theirs, ids, mask, decoding)
    else:  # transformers takes padding for tokens that may not be repeated
        alone = [
            theirs_of(theirs, row[None, real > 0], real[None, real > 0], decoding)
            for row, real in zip(ids, mask, strict=True)
        ]
        tokens, log_probs = (np.concatenate(each) for each in zip(*alone, strict=True))
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_allclose(got.log_probs, log_probs, atol=1e-4)
    total = np.where(got.log_probs == NO_LOG_PROB, 0.0, got.log_probs).sum(axis=-1)
    if decoding.num_beams == 1:
        np.testing.assert_allclose(got.scores, total, atol=1e-4)
    elif decoding.length_penalty == 1.0:
        length = (got.log_probs != NO_LOG_PROB).sum(axis=-1)
        np.testing.assert_allclose(got.scores, total / length, atol=1e-4)


def test_tokens_of_the_prompt_may_be_generated_again(models):
    """The repetition penalty bears on the prompt only with `penalties_include_prompt`."""
    theirs, ours = models
    if theirs.config.is_encoder_decoder:
        pytest.skip("its prompt is not part of the decoder's sequence")
    ids, mask = prompts()
    texts = [
        ours_of(ours, ids, mask, Decoding(1, repetition_penalty=50.0, penalties_include_prompt=x))
        for x in (True, False)
    ]
    free = ours_of(ours, ids, mask, Decoding(1))
    np.testing.assert_array_equal(texts[1].log_probs, free.log_probs)
    assert (texts[0].log_probs != free.log_probs).any()


def test_scores_of_samples_are_those_of_what_they_were_drawn_from(models):
    theirs, ours = models
    ids, mask = prompts(left=not theirs.config.is_encoder_decoder)
    decoding = Decoding(5, do_sample=True, temperature=1.3, top_k=9, num_return_sequences=2)
    got = ours_of(ours, ids, mask, decoding, pad=EOS)
    for sequence in range(2):
        tokens = torch.tensor(np.array(got.tokens[:, sequence]))
        before = torch.tensor(ids)
        with torch.no_grad():
            if theirs.config.is_encoder_decoder:
                start = torch.cat([torch.zeros(len(ids), 1, dtype=int), tokens[:, :-1]], dim=1)
                logits = theirs(before, torch.tensor(mask), decoder_input_ids=start).logits
            else:
                whole = torch.cat([before, tokens], dim=1)
                real = torch.cat([torch.tensor(mask), torch.ones_like(tokens)], dim=1)
                logits = theirs(whole, real).logits[:, before.shape[1] - 1 : -1]
        for warper in (
            transformers.TemperatureLogitsWarper(1.3),
            transformers.TopKLogitsWarper(9),
        ):
            logits = warper(None, logits.flatten(0, 1)).reshape(logits.shape)
        want = (
            torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None].long())[..., 0].numpy()
        )
        generated = np.array(got.log_probs[:, sequence]) != NO_LOG_PROB
        assert generated[:, 0].all()
        np.testing.assert_allclose(
            np.array(got.log_probs[:, sequence])[generated], want[generated], atol=1e-4
        )


def test_a_row_alone_is_the_row_in_a_batch(models):
    theirs, ours = models
    ids, mask = prompts(left=not theirs.config.is_encoder_decoder)
    decoding = Decoding(LENGTH, num_beams=3)
    together = ours_of(ours, ids, mask, decoding).tokens
    for row in (1, 3):
        real = mask[row] > 0  # without its padding
        alone = ours_of(ours, ids[row : row + 1, real], mask[row : row + 1, real], decoding).tokens
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("prompt, eos", [(True, False), (False, False), (True, True)])
def test_the_length_penalty_may_count_the_prompt_and_leave_out_the_end_token(models, prompt, eos):
    """Older meanings: prompt and text, or text alone, without the end token."""
    theirs, ours = models
    ids, mask = prompts(left=not theirs.config.is_encoder_decoder)
    decoding = Decoding(LENGTH, num_beams=4, num_return_sequences=4, length_penalty=0.0)
    none = -1  # no token of the model, to see where texts end
    tokens, total, _ = ours_of(ours, ids, mask, decoding, none)
    new = dataclasses.replace(decoding, length_penalty=1.0)
    old = dataclasses.replace(
        new, length_penalty_includes_prompt=prompt, length_penalty_includes_eos=eos
    )
    old_tokens, old_score, _ = ours_of(ours, ids, mask, old, none)
    before = mask.sum(axis=1) if not theirs.config.is_encoder_decoder else np.ones(len(ids))
    before = before * prompt
    rows = range(len(ids))
    known = {(row, tuple(text)): p for row in rows for text, p in zip(tokens[row], total[row])}  # noqa: B905
    checked = 0
    for row in rows:
        for text, value in zip(old_tokens[row], old_score[row], strict=True):
            if (row, tuple(text)) in known:
                generated = (text != none).sum() + (eos and (text == none).any())
                length = max(1, before[row] + generated)
                np.testing.assert_allclose(value * length, known[row, tuple(text)], rtol=1e-4)
                checked += 1
    assert checked > 3
    if prompt or (old_tokens == none).any():  # there are end tokens to leave out
        assert not np.allclose(ours_of(ours, ids, mask, new, none).scores, old_score)
