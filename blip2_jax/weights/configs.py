"""Hugging Face `config.json` files as sizes here, and back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from blip2_jax.models.llama import LlamaConfig, RopeConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.models.vit import ViTConfig

LLMConfig = OPTConfig | LlamaConfig | T5Config


class WeightsError(ValueError):
    """A checkpoint that cannot be what it should be; the message names file, tensor and remedy."""


def parse(
    config: Mapping[str, Any], known: Mapping[str, Callable], source: str, **overrides: Any
) -> Any:
    """Sizes of a parsed `config.json`.

    Args:
      config: the JSON document.
      known: model_type -> reader, `LLMS` or `VITS`.
      source: named in errors.
      **overrides: fields to set whatever the file says; those that the family lacks (Llama has
        no dropout) are left out.
    """
    kind = config.get("model_type")
    if kind not in known:
        raise WeightsError(f"{source}: model_type {kind!r}; known: {', '.join(known)}.")
    try:
        sizes = known[kind](config)
    except KeyError as error:
        raise WeightsError(f"{source}: config.json of a {kind} has no {error}.") from error
    fields = {field.name for field in dataclasses.fields(sizes)}
    return dataclasses.replace(sizes, **{k: v for k, v in overrides.items() if k in fields})


def _opt(config: Mapping[str, Any]) -> OPTConfig:
    width = config["hidden_size"]
    if not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm"):
        raise WeightsError("OPT-350m's post-norm layers are not supported; take another size.")
    if config.get("word_embed_proj_dim", width) != width:
        raise WeightsError("An OPT with projected word embeddings is not supported.")
    return OPTConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        ffn_dim=config["ffn_dim"],
        max_position_embeddings=config["max_position_embeddings"],
        activation=config.get("activation_function", "relu"),
        dropout=config.get("dropout", 0.1),
    )


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Both generations: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or RopeConfig.theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise WeightsError(f"Rotary scaling {kind!r}; known: default, linear, llama3.")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=rope.get("factor") or 1.0,
        low_freq_factor=rope.get("low_freq_factor") or 1.0,
        high_freq_factor=rope.get("high_freq_factor") or 4.0,
        original_length=rope.get("original_max_position_embeddings") or 8192,
    )


def _llama(config: Mapping[str, Any]) -> LlamaConfig:
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise WeightsError("A Llama with biases is not supported.")
    heads = config["num_attention_heads"]
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_dim=config["intermediate_size"],
        activation=config.get("hidden_act", "silu"),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_head=config.get("tie_word_embeddings", False),
        rope=_rope(config),
    )


def _t5(config: Mapping[str, Any]) -> T5Config:
    """T5 v1.1; an explicit `dense_act_fn` wins over what `feed_forward_proj` says.

    `tie_word_embeddings` is no witness: transformers 5 writes True for untied FlanT5s too, and
    the scaling of a tied head as `scale_decoder_outputs`.
    """
    form = config.get("feed_forward_proj", "relu")
    if not form.startswith("gated-"):
        raise WeightsError(f"A T5 with feed_forward_proj {form!r}; only gated ones (v1.1, Flan).")
    derived = "gelu_new" if form == "gated-gelu" else form.removeprefix("gated-")
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return T5Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["d_model"],
        num_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        activation=config.get("dense_act_fn") or derived,
        relative_buckets=config.get("relative_attention_num_buckets", 32),
        relative_max_distance=config.get("relative_attention_max_distance", 128),
        rms_norm_eps=config.get("layer_norm_epsilon", 1e-6),
        tied_head=scaled,
        scale_logits=scaled,
        dropout=config.get("dropout_rate", 0.1),
        decoder_start_id=config.get("decoder_start_token_id") or 0,
    )


def _clip_vision(config: Mapping[str, Any]) -> ViTConfig:
    return ViTConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        activation=config["hidden_act"],
        layer_norm_eps=config["layer_norm_eps"],
        attention_bias="qkvo",
        patch_bias=False,
        pre_norm=True,
    )


LLMS = {"opt": _opt, "llama": _llama, "t5": _t5}
VITS = {"clip_vision_model": _clip_vision}

# What transformers puts before the names of the bare model in each family's files.
PREFIXES = {OPTConfig: "model.", LlamaConfig: "model.", T5Config: "", ViTConfig: ""}


def write(sizes: Any) -> dict[str, Any]:
    """The `config.json` that transformers reads for a tower of these sizes.

    A ViT is written as a CLIP vision model, which it must be: without `patch_bias`, with
    `pre_norm`, and with biases of q, k and v.
    """
    if isinstance(sizes, OPTConfig):
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "word_embed_proj_dim": sizes.hidden_size,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
            "ffn_dim": sizes.ffn_dim,
            "max_position_embeddings": sizes.max_position_embeddings,
            "activation_function": sizes.activation,
            "dropout": sizes.dropout,
        }
    if not isinstance(sizes, ViTConfig):
        raise WeightsError(f"{type(sizes).__name__} cannot be written as config.json yet.")
    if sizes.patch_bias or not sizes.pre_norm or sorted(sizes.attention_bias) != sorted("qkvo"):
        raise WeightsError("Only a CLIP-like ViT can be written as clip_vision_model.")
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.mlp_dim,
        "hidden_act": sizes.activation,
        "layer_norm_eps": sizes.layer_norm_eps,
    }
