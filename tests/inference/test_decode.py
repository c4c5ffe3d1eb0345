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

from blip2_jax.inference.decode import Decoding, Prompt, _sample, _sharpen, decode
from blip2_jax.models.blip2 import LLMS
from blip2_jax.models.layers import unstack
from blip2_jax.weights import huggingface

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
    sizes = huggingface.llm_config(str(folder))
    make = lambda s: LLMS[type(s)](s, dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make(sizes))))
    params = unstack(huggingface.load(str(folder), sizes, abstract))
    listed = dataclasses.replace(sizes, scan=False)
    return theirs, (nnx.graphdef(nnx.eval_shape(lambda: make(listed))), params)


def prompts(left: bool = True):
    """Six prompts of unequal length, padded on the left (an encoder-decoder's: on the right)."""
    rng = np.random.default_rng(3)
    lengths = np.array([7, 3, 5, 1, 7, 6])[:, None]
    place = np.arange(7)
    mask = (place >= 7 - lengths if left else place < lengths).astype(np.int32)
    return np.where(mask > 0, rng.integers(6, VOCABULARY, mask.shape), PAD).astype(np.int32), mask


@functools.partial(jax.jit, static_argnames=("graph", "how", "pad"))
def run(graph, params, ids, mask, said, row, key, how: Decoding, pad: int):
    llm = nnx.merge(graph, params)
    prompt = Prompt(llm.embed(ids), mask, *said, row)
    return decode(llm, prompt, how, eos_ids=(EOS,), pad_id=pad, key=key)


def ours_of(ours, ids, mask, how: Decoding, pad: int = PAD):
    graph, params = ours
    # What was said before: an encoder-decoder's decoder has its start token only.
    said = (ids, mask)
    if "decoder" in params:
        said = (np.zeros((len(ids), 1), int), np.ones((len(ids), 1), int))
    row = np.arange(len(ids))
    return jax.device_get(run(graph, params, ids, mask, said, row, jax.random.key(0), how, pad))


def theirs_of(model, ids, mask, how: Decoding):
    options = {
        name: getattr(how, name)
        for name in ("num_beams", "repetition_penalty", "early_stopping", "num_return_sequences")
    }
    if how.num_beams > 1:
        options["length_penalty"] = how.length_penalty
    if how.min_new_tokens:
        options["min_new_tokens"] = how.min_new_tokens
    with torch.no_grad():
        out = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=how.max_new_tokens,
            do_sample=False,
            **options,
        ).numpy()
    out = out[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :]
    want = np.full((len(out), how.max_new_tokens), PAD)
    want[:, : out.shape[1]] = np.where(out == EOS, PAD, out)
    return want.reshape(len(ids), -1, how.max_new_tokens)


HOWS = [
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
]


def name_of(how: Decoding) -> str:
    default = Decoding(LENGTH)
    changed = {k: v for k, v in vars(how).items() if v != getattr(default, k)}
    return " ".join(f"{k}={v}" for k, v in changed.items()) or "greedy"


@pytest.mark.parametrize("how", HOWS, ids=name_of)
def test_tokens_equal_those_of_transformers(models, how):
    theirs, ours = models
    ids, mask = prompts(left=not theirs.config.is_encoder_decoder)
    got, _ = ours_of(ours, ids, mask, how)
    np.testing.assert_array_equal(got, theirs_of(theirs, ids, mask, how))


def test_a_row_alone_is_the_row_in_a_batch(models):
    theirs, ours = models
    ids, mask = prompts(left=not theirs.config.is_encoder_decoder)
    how = Decoding(LENGTH, num_beams=3)
    together, _ = ours_of(ours, ids, mask, how)
    for row in (1, 3):
        real = mask[row] > 0  # without its padding
        alone, _ = ours_of(ours, ids[row : row + 1, real], mask[row : row + 1, real], how)
        np.testing.assert_array_equal(alone[0], together[row])


WARPERS = {
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
}


@pytest.mark.parametrize(
    "how",
    [
        dict(temperature=0.7),
        dict(top_k=4),
        dict(top_p=0.6),
        dict(temperature=1.5, top_k=12, top_p=0.9),
    ],
    ids=str,
)
def test_sampling_sharpens_as_transformers_does(how):
    scores = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32) * 3
    want = torch.tensor(scores)
    for name, value in how.items():
        want = WARPERS[name](value)(None, want)
    got = _sharpen(jnp.asarray(scores)[:, None], Decoding(do_sample=True, **how))[:, 0]
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def test_samples_are_drawn_in_proportion():
    """Frequencies of 4,000 draws lie within five standard errors of the probabilities."""
    scores = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draws = _sample(jnp.broadcast_to(scores, (4000, 1, 4)), jnp.arange(4000), jax.random.key(0))
    share = np.bincount(np.asarray(draws).ravel(), minlength=4) / 4000
    probability = np.exp(scores)
    error = np.sqrt(probability * (1 - probability) / 4000)
    assert (np.abs(share - probability) < 5 * error).all()


def test_length_may_count_the_prompt_as_it_did_before(models):
    """The older meaning: prompt and text, without the end token."""
    theirs, ours = models
    ids, mask = prompts(left=not theirs.config.is_encoder_decoder)
    how = Decoding(LENGTH, num_beams=4, num_return_sequences=4, length_penalty=0.0)
    none = -1  # what no model says, to see where texts end
    tokens, total = ours_of(ours, ids, mask, how, none)
    new = dataclasses.replace(how, length_penalty=1.0)
    old = dataclasses.replace(new, length_counts="prompt")
    old_tokens, old_score = ours_of(ours, ids, mask, old, none)
    before = mask.sum(axis=1) if not theirs.config.is_encoder_decoder else np.ones(len(ids))
    rows = range(len(ids))
    known = {(row, tuple(text)): p for row in rows for text, p in zip(tokens[row], total[row])}  # noqa: B905
    checked = 0
    for row in rows:
        for text, value in zip(old_tokens[row], old_score[row], strict=True):
            if (row, tuple(text)) in known:
                length = before[row] + (text != none).sum()
                np.testing.assert_allclose(value * length, known[row, tuple(text)], rtol=1e-4)
                checked += 1
    assert checked > 3
    assert not np.allclose(ours_of(ours, ids, mask, new, none)[1], old_score)
