"""Every family's `config.json`, in all the forms that transformers has written, gives its sizes."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip2_jax.models.blip2 import LLMS
from blip2_jax.models.llama import frequencies
from blip2_jax.models.vit import ViT, normalize_images
from blip2_jax.weights import checkpoint, configs, huggingface
from blip2_jax.weights.configs.defaults import DEFAULTS
from blip2_jax.weights.files import WeightsError
from tests.weights import models

CLASSES = {
    "opt": transformers.OPTConfig,
    "llama": transformers.LlamaConfig,
    "t5": transformers.T5Config,
    "clip_vision_model": transformers.CLIPVisionConfig,
    "blip_2_vision_model": transformers.Blip2VisionConfig,
    "instructblip_vision_model": transformers.InstructBlipVisionConfig,
    "blip_2_qformer": transformers.Blip2QFormerConfig,
    "instructblip_qformer": transformers.InstructBlipQFormerConfig,
    "blip-2": transformers.Blip2Config,
    "instructblip": transformers.InstructBlipConfig,
}
# Keys that older classes had, or that are no field of the class: what it makes of their absence.
OLDER = {
    ("llama", "rope_theta"): transformers.LlamaConfig.default_theta,
    ("llama", "rope_scaling"): None,
    ("llama", "original_max_position_embeddings"): None,
    ("llama", "partial_rotary_factor"): None,
    ("t5", "dense_act_fn"): None,  # follows from feed_forward_proj
    ("t5", "tie_word_embeddings"): transformers.T5Config().tie_word_embeddings,
    ("t5", "scale_decoder_outputs"): None,  # follows from tie_word_embeddings
    ("t5", "decoder_start_token_id"): None,
    ("blip_2_vision_model", "num_channels"): 3,
    ("instructblip_vision_model", "num_channels"): 3,
    ("blip_2_qformer", "position_embedding_type"): "absolute",
    ("instructblip_qformer", "position_embedding_type"): "absolute",
    ("instructblip", "image_text_hidden_size"): 256,
}
HUB = Path(__file__).parent / "hub/blip2-opt-2.7b.json"  # as it is on the hub, unedited


def test_defaults_are_those_of_the_classes():
    assert DEFAULTS.keys() == CLASSES.keys()
    for family, table in DEFAULTS.items():
        cls = CLASSES[family]
        for key, value in table.items():
            if (family, key) in OLDER:
                assert not isinstance(cls.__dict__.get(key), (int, float, str, bool)), key
                assert value == OLDER[family, key], (family, key)
            else:
                assert value == getattr(cls, key), (family, key)


@pytest.mark.parametrize("family", CLASSES)
def test_every_key_that_is_read_has_a_default_and_every_default_is_read(family, monkeypatch):
    read = set()
    for name in ("__getitem__", "token", "tokens", "side"):
        get = getattr(configs.Fields, name)

        def seen(self, key, get=get):
            read.add((self.family, key))
            return get(self, key)

        monkeypatch.setattr(configs.Fields, name, seen)
    required = {"feed_forward_proj": "gated-gelu", "eos_token_id": 2}
    if family in configs.LLMS:
        configs.parse({"model_type": family, **required}, configs.LLMS, "test")
    elif family in configs.VITS:
        configs.parse({"model_type": family}, configs.VITS, "test")
    else:
        config = {"model_type": "instructblip" if "instruct" in family else "blip-2"}
        configs.parse_blip2(config, "test")
    parts = {"vision_config", "qformer_config", "text_config"}  # read as documents
    unread = {"image_text_hidden_size"} if family == "instructblip" else set()
    assert {key for f, key in read if f == family} | parts | unread >= set(DEFAULTS[family])


# ------------------------------------------------------------------------------------ the hub's


def test_the_config_of_the_hub_gives_the_published_sizes():
    config = configs.parse_blip2(json.loads(HUB.read_text()), "Salesforce/blip2-opt-2.7b")
    llm, vit, q = config.llm, config.vit, config.qformer
    assert (llm.vocab_size, llm.hidden_size, llm.num_layers, llm.num_heads) == (50304, 2560, 32, 32)
    assert (llm.ffn_dim, llm.max_position_embeddings, llm.activation) == (10240, 2048, "relu")
    assert (llm.eos_token_ids, llm.bos_token_id, llm.pad_token_id) == ((50118,), 2, 1)
    assert (vit.hidden_size, vit.num_layers, vit.num_heads, vit.mlp_dim) == (1408, 39, 16, 6144)
    assert (vit.image_size, vit.patch_size, vit.layer_norm_eps) == (224, 14, 1e-6)
    assert (q.num_query_tokens, q.hidden_size, q.num_layers, q.vocab_size) == (32, 768, 12, 30522)
    assert not config.qformer_reads_prompt
    assert config == configs.parse_blip2(
        transformers.Blip2Config(**json.loads(HUB.read_text())).to_dict(), "as transformers 5"
    )


def small(document):
    """The same document with the sizes of `models`, and nothing else changed or added."""
    of = {"vision_config": models.VISION, "qformer_config": models.QFORMER, "text_config": {
        key: models.OPT[key] for key in document["text_config"] if key in models.OPT}}  # fmt: skip
    parts = {name: {**document[name], **sizes} for name, sizes in of.items()}
    return {**document, **parts, "num_query_tokens": 5, "image_token_index": 69}


def test_a_small_model_with_the_config_of_the_hub_loads(tmp_path):
    document = small(json.loads(HUB.read_text()))
    assert "max_position_embeddings" not in document["text_config"]
    theirs = models.randomize(
        transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**document))
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "generation_config.json").unlink()
    opened = checkpoint.open_checkpoint(str(tmp_path))
    assert opened.config.llm.eos_token_ids == (50118,)
    params = opened.load(opened.abstract())
    huggingface.save_blip2(tmp_path / "out", opened.config, params, companions=tmp_path)
    back = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    for (name, want), got in zip(theirs.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(want, got), name
    assert back.config.text_config.eos_token_id == 50118


# ------------------------------------------------------------------------ all forms, all families


def pick(rng, *options):
    return options[rng.integers(len(options))]


def sizes_of(family, rng, largest=2000):
    """A document of random sizes, complete in nothing: each key is there or not."""
    heads = pick(rng, 1, 2, 4, 8)
    width = heads * pick(rng, 8, 16, 24)
    act = pick(rng, "relu", "gelu", "gelu_new", "silu", "quick_gelu")

    def number(low=1, high=largest):
        return int(rng.integers(low, high))

    eps = float(rng.choice([1e-6, 1e-5, 1e-12]))
    common = {
        "opt": lambda: {
            "vocab_size": number(30), "hidden_size": width, "num_hidden_layers": number(1, 9),
            "num_attention_heads": heads, "ffn_dim": number(),
            "max_position_embeddings": number(20), "activation_function": act,
            "dropout": float(rng.random()),
            "tie_word_embeddings": bool(rng.integers(2)), "enable_bias": bool(rng.integers(2)),
            "eos_token_id": number(),
        },
        "llama": lambda: {
            "vocab_size": number(30), "hidden_size": width, "num_hidden_layers": number(1, 9),
            "num_attention_heads": heads, "num_key_value_heads": pick(rng, None, 1, heads),
            "intermediate_size": number(), "hidden_act": act, "rms_norm_eps": eps,
            "max_position_embeddings": number(64, 4096),
            "tie_word_embeddings": bool(rng.integers(2)),
            "head_dim": pick(rng, None, 8, 32), "eos_token_id": [number(3), number(3)],
            "rope_parameters": rope_of(rng),
        },
        "t5": lambda: {
            "vocab_size": number(30), "d_model": width, "d_kv": number(), "d_ff": number(),
            "num_layers": number(1, 9), "num_decoder_layers": pick(rng, None, number(1, 9)),
            "num_heads": heads, "relative_attention_num_buckets": 2 * number(2, 30),
            "relative_attention_max_distance": number(60, 200), "dropout_rate": float(rng.random()),
            "layer_norm_epsilon": eps, "feed_forward_proj": pick(rng, "gated-gelu", "gated-silu"),
            "tie_word_embeddings": bool(rng.integers(2)), "decoder_start_token_id": 0,
        },
        "vision": lambda: {
            "image_size": number(28, 60), "patch_size": number(5, 20), "hidden_size": width,
            "num_hidden_layers": number(1, 9), "num_attention_heads": heads,
            "intermediate_size": number(), "hidden_act": act, "layer_norm_eps": eps,
        },
        "qformer": lambda: {
            "vocab_size": number(), "hidden_size": width, "num_hidden_layers": 2 * number(1, 5),
            "num_attention_heads": heads, "intermediate_size": number(),
            "cross_attention_frequency": pick(rng, 1, 2), "max_position_embeddings": number(),
            "layer_norm_eps": eps, "hidden_dropout_prob": float(rng.random()),
        },
    }  # fmt: skip
    document = common["vision" if "vision" in family else family]()
    # A class default left standing is what differs between the forms.
    kept = {k: v for k, v in document.items() if v is not None and rng.random() < 0.7}
    if family == "t5":
        kept["feed_forward_proj"] = document["feed_forward_proj"]
    if "hidden_size" in kept or "num_attention_heads" in kept:
        for key in ("hidden_size", "num_attention_heads"):
            if key in document:
                kept[key] = document[key]
    return kept


def rope_of(rng):
    base = {"rope_theta": float(rng.choice([1e4, 5e5]))}
    factor = {"factor": float(rng.integers(2, 9))}
    original = {"original_max_position_embeddings": int(rng.integers(32, 64))}
    return pick(
        rng,
        {**base, "rope_type": "default"},
        {**base, **factor, "rope_type": "linear"},
        {**base, **factor, "rope_type": "dynamic"},
        {**base, **factor, **original, "rope_type": "llama3", "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
        {**base, **factor, **original, "rope_type": "yarn"},
    )  # fmt: skip


FAMILIES = ("opt", "llama", "t5", "clip_vision_model", "blip_2_vision_model")


@pytest.mark.parametrize("family", FAMILIES)
def test_old_middle_and_new_forms_of_random_sizes_parse_equal(family):
    known = configs.LLMS | configs.VITS
    rng = np.random.default_rng(0)
    for _ in range(200):
        theirs = CLASSES[family](**sizes_of(family, rng))
        new = json.loads(theirs.to_json_string(use_diff=False))
        documents = {
            "new": new,
            "new, as saved": json.loads(theirs.to_json_string()),
            "old": models.earlier(dict(new)),
            "middle": models.differences(theirs),
        }
        parsed = {form: configs.parse(d, known, form) for form, d in documents.items()}
        middle = parsed.pop("middle")
        if family == "opt" and not middle.eos_token_ids:  # nothing said is nothing said
            middle = dataclasses.replace(middle, eos_token_ids=parsed["new"].eos_token_ids)
        assert middle == parsed["new"], documents["middle"]
        assert parsed["old"] == parsed["new, as saved"] == parsed["new"]
        same_as(theirs, parsed["new"])
        written = configs.parse(configs.write(middle), known, "written")
        assert written == middle


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_sizes_compute_what_transformers_computes(family, seed, tmp_path):
    """With nothing in config.json but what differs from the class's defaults."""
    sizes = {**FEW[family], **sizes_of(family, np.random.default_rng([seed, 7]), largest=64)}
    sizes = {**sizes, **{key: FEW[family][key] for key in sizes if key in FEW[family]}}
    theirs = MODELS[family](CLASSES[family](**sizes))
    if family == "t5" and sizes.get("tie_word_embeddings") is False:
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    models.randomize(theirs).save_pretrained(tmp_path)
    document = models.differences(theirs.config)
    (tmp_path / "config.json").write_text(json.dumps(document))
    vision = family in configs.VITS
    read = huggingface.vit_config if vision else huggingface.llm_config
    options = {"activation": theirs.config.dense_act_fn} if family == "t5" else {}
    ours = read(str(tmp_path), **options)

    def make():
        return (ViT if vision else LLMS[type(ours)])(ours, rngs=nnx.Rngs(0))

    shapes = nnx.eval_shape(make)
    params = huggingface.load(str(tmp_path), ours, nnx.to_pure_dict(nnx.state(shapes)))
    model = nnx.merge(nnx.graphdef(shapes), params)
    rng = np.random.default_rng(seed)
    if vision:
        images = rng.integers(0, 256, (2, ours.image_size, ours.image_size, 3)).astype(np.uint8)
        pixels = torch.tensor(np.array(normalize_images(images)).transpose(0, 3, 1, 2))
        with torch.no_grad():
            want = theirs(pixels, output_hidden_states=True).hidden_states[-1]
        got = model(jnp.asarray(images))
    else:
        ids, text = rng.integers(3, ours.vocab_size, (2, 2, 9))
        given = {"input_ids": torch.tensor(ids)}
        with torch.no_grad():
            if family == "t5":
                want = theirs(**given, labels=torch.tensor(text)).logits
            else:
                want = theirs(torch.tensor(np.concatenate([ids, text], axis=1))).logits[:, 8:-1]
        mask = np.ones_like(ids)
        got = model.score(model.embed(jnp.asarray(ids)), mask, jnp.asarray(text), mask)
    want = want.numpy()
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, np.abs(want).max()))


MODELS = {
    "opt": transformers.OPTForCausalLM,
    "llama": transformers.LlamaForCausalLM,
    "t5": transformers.T5ForConditionalGeneration,
    "clip_vision_model": transformers.CLIPVisionModel,
    "blip_2_vision_model": transformers.Blip2VisionModel,
}
# Depths that are left out of a random draw would be the class's own.
FEW = {
    "opt": {"num_hidden_layers": 2, "dropout": 0.0},
    "llama": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
    "t5": {
        "num_layers": 2, "num_decoder_layers": 1, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    },
    "clip_vision_model": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
    "blip_2_vision_model": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
}  # fmt: skip


def same_as(theirs, ours):
    """Sizes against the attributes that transformers computes with."""
    names = {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers":
        "num_hidden_layers", "num_heads": "num_attention_heads", "ffn_dim": "ffn_dim",
        "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
        "num_decoder_layers": "num_decoder_layers", "image_size": "image_size",
        "patch_size": "patch_size", "layer_norm_eps": "layer_norm_eps",
    }  # fmt: skip
    for field in dataclasses.fields(ours):
        if field.name in names and hasattr(theirs, names[field.name]):
            assert getattr(ours, field.name) == getattr(theirs, names[field.name]), field.name


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
@pytest.mark.parametrize("llm", ["opt", "llama", "t5"])
def test_nested_forms_of_random_sizes_parse_equal(kind, llm):
    rng = np.random.default_rng(1)
    name = {"blip-2": "blip_2", "instructblip": "instructblip"}[kind]
    for _ in range(30):
        parts = {
            "vision_config": CLASSES[f"{name}_vision_model"](**sizes_of(f"{name}_vision", rng)),
            "qformer_config": CLASSES[f"{name}_qformer"](**sizes_of("qformer", rng)),
            "text_config": CLASSES[llm](**sizes_of(llm, rng)),
        }
        queries = int(rng.integers(1, 40))
        whole = CLASSES[kind](
            **{key: part.to_dict() for key, part in parts.items()}, num_query_tokens=queries
        )
        new = json.loads(whole.to_json_string())
        middle = {"model_type": kind, "num_query_tokens": queries} | {
            key: models.differences(part) for key, part in parts.items()
        }
        for part in ("vision_config", "qformer_config"):
            if rng.random() < 0.5:  # as the oldest: no model_type inside
                del middle[part]["model_type"]
        wanted, parsed = (configs.parse_blip2(d, "test") for d in (new, middle))
        if not parsed.llm.eos_token_ids:
            llm_sizes = dataclasses.replace(parsed.llm, eos_token_ids=wanted.llm.eos_token_ids)
            parsed = dataclasses.replace(parsed, llm=llm_sizes)
        assert parsed == wanted


def test_a_part_of_another_family_is_refused():
    for part, family in (
        ("vision_config", "siglip_vision_model"),
        ("qformer_config", "bert"),
        ("text_config", "mamba"),
    ):
        with pytest.raises(WeightsError, match=rf"\({part}\): model_type '{family}'; known"):
            configs.parse_blip2({"model_type": "blip-2", part: {"model_type": family}}, "here")


# ------------------------------------------------------------------------------ rotary positions

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}
ROPES = {
    "another base": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 24},
    "llama3 that says no length": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all of it": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0,
                        "original_max_position_embeddings": 16, "truncate": False,
                        "mscale": 0.7, "mscale_all_dim": 0.3, "rope_theta": 500000.0},
    "yarn with its own magnitude": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3},
    "longrope": LONGROPE,
    "longrope with a factor": {**LONGROPE, "factor": 4.0},
}  # fmt: skip


def rope_config(rope, beside):
    sizes = {**models.LLAMA, "hidden_size": 64, "num_attention_heads": 4, **beside}
    return {**sizes, "rope_parameters": {"rope_theta": 10000.0, **rope}}


@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 40}], ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions_turn_as_in_transformers(name, beside):
    """With the trained length inside, beside (which wins) or nowhere (then it is the longest)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    document = rope_config(ROPES[name], beside)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**json.loads(json.dumps(document))))
    ours = configs.parse(document, configs.LLMS, "test")
    np.testing.assert_allclose(
        frequencies(ours.rope, ours.head_dim), theirs.inv_freq.numpy(), rtol=1e-6
    )
    assert ours.rope.magnitude == pytest.approx(theirs.attention_scaling, rel=1e-6)
    written = configs.parse(configs.write(ours), configs.LLMS, "written")
    assert frequencies(written.rope, 16).tolist() == frequencies(ours.rope, 16).tolist()
    assert written.rope.magnitude == ours.rope.magnitude


def test_a_rotary_scaling_that_is_not_known_is_named():
    for rope, message in (
        ({"rope_type": "proportional"}, "rotary scaling 'proportional'; known: default, linear"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "differ by layer"),
        ({"rope_type": "linear"}, "'linear' without a number for 'factor'"),
        ({**LONGROPE, "short_factor": [1.0]}, "needs 8 numbers in short_factor"),
    ):
        with pytest.raises(WeightsError, match=message):
            configs.parse(rope_config(rope, {}), configs.LLMS, "test")


# -------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**models.LLAMA, "architectures": ["GraniteForCausalLM"]}, "architectures names Granite"),
        ({**models.LLAMA, "architectures": ["LlamaMoEForCausalLM"]}, "names LlamaMoE"),
        ({**models.LLAMA, "sliding_window": 4096}, "sliding_window is 4096"),
        ({**models.LLAMA, "residual_multiplier": 0.2}, "residual_multiplier is 0.2"),
        ({**models.LLAMA, "hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
        ({**models.OPT, "architectures": ["BartForCausalLM"]}, "architectures names Bart"),
        ({**models.T5, "architectures": ["UMT5ForConditionalGeneration"]}, "names UMT5"),
        ({**models.OPT, "activation_function": "snake"}, "activation_function is 'snake'; known"),
        ({**models.LLAMA, "hidden_act": "gelu_10"}, "hidden_act is 'gelu_10'; known"),
        ({**models.T5, "dense_act_fn": "mish"}, "dense_act_fn is 'mish'; known"),
        ({**models.T5, "feed_forward_proj": "relu"}, "only gated ones"),
        ({**models.OPT, "vocab_size": "70"}, "vocab_size is '70', which is no int"),
        ({**models.OPT, "num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({**models.OPT, "num_attention_heads": 3}, "hidden_size 160 is not a multiple"),
        ({**models.LLAMA, "num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({**models.OPT, "eos_token_id": "</s>"}, "eos_token_id is '</s>', which is no token's id"),
        ({**models.OPT, "layer_norm_elementwise_affine": False}, "only True is supported"),
        ({**models.OPT, "quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
    ],
)  # fmt: skip
def test_what_would_compute_something_else_is_refused(document, message):
    with pytest.raises(WeightsError, match=message):
        configs.parse(document, configs.LLMS, "here")


def test_names_of_classes_of_any_age_are_known():
    for family, names in {
        "llama": ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
        "opt": ("OPTForCausalLM", "OPTModel"),
        "t5": ("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    }.items():
        for name in names:
            configs.parse({**models.TEXT[family], "architectures": [name]}, configs.LLMS, "test")


def test_sides_of_images_come_in_several_forms():
    base = {"model_type": "clip_vision_model"}
    sizes = configs.parse({**base, "image_size": [336, 336]}, configs.VITS, "test")
    assert sizes.image_size == 336
    with pytest.raises(WeightsError, match=r"image_size is \[224, 336\]; images .* are squares"):
        configs.parse({**base, "image_size": [224, 336]}, configs.VITS, "test")


def test_the_first_conversions_of_llama_named_the_wrong_end():
    sizes = configs.parse(
        {"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
        configs.LLMS,
        "test",
    )
    assert (sizes.bos_token_id, sizes.eos_token_ids, sizes.pad_token_id) == (1, (2,), None)
