"""Hugging Face `config.json` files as sizes here, and back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.llama import LlamaConfig, RopeConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights.files import WeightsError


def parse(
    config: Mapping[str, Any],
    known: Mapping[str, Callable[..., Any]],
    source: str,
    **overrides: Any,
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
    if kind is None or kind not in known:
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
        align_corners=True,
    )


def _eva_vision(config: Mapping[str, Any]) -> ViTConfig:
    """`Blip2VisionConfig`; public files leave out what equals that class's defaults."""
    if not config.get("qkv_bias", True):
        raise WeightsError("A BLIP-2 vision model without biases of q and v is not supported.")
    return ViTConfig(
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 14),
        hidden_size=config.get("hidden_size", 1408),
        num_layers=config.get("num_hidden_layers", 39),
        num_heads=config.get("num_attention_heads", 16),
        mlp_dim=config.get("intermediate_size", 6144),
        activation=config.get("hidden_act", "gelu"),
        layer_norm_eps=config.get("layer_norm_eps", 1e-6),
    )


def _qformer(config: Mapping[str, Any], num_query_tokens: int) -> QFormerConfig:
    """`Blip2QFormerConfig`; public files leave out what equals that class's defaults."""
    return QFormerConfig(
        num_query_tokens=num_query_tokens,
        hidden_size=config.get("hidden_size", 768),
        num_layers=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 12),
        mlp_dim=config.get("intermediate_size", 3072),
        cross_attention_frequency=config.get("cross_attention_frequency", 2),
        encoder_width=config.get("encoder_hidden_size", 1408),
        vocab_size=config.get("vocab_size", 30522),
        bos_token_id=config.get("vocab_size", 30523) - 1,
        max_position_embeddings=config.get("max_position_embeddings", 512),
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
        dropout=config.get("hidden_dropout_prob", 0.1),
    )


LLMS = {"opt": _opt, "llama": _llama, "t5": _t5}
VITS = {"clip_vision_model": _clip_vision, "blip_2_vision_model": _eva_vision}

GENERATION, RETRIEVAL, INSTRUCT = (
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "InstructBlipForConditionalGeneration",
)


def architecture(config: Mapping[str, Any], source: str) -> str:
    """Which of the three BLIP-2 classes of transformers a parsed `config.json` is for."""
    if config.get("model_type") == "instructblip":
        return INSTRUCT
    if config.get("model_type") != "blip-2":
        raise WeightsError(
            f"{source}: model_type {config.get('model_type')!r}; known: blip-2, instructblip."
        )
    name = (config.get("architectures") or [GENERATION])[0]
    if name in (GENERATION, "Blip2Model"):
        return GENERATION
    if name == RETRIEVAL:
        return RETRIEVAL
    raise WeightsError(f"{source}: architecture {name!r}; known: {GENERATION}, {RETRIEVAL}.")


def parse_blip2(config: Mapping[str, Any], source: str) -> Blip2Config:
    """Sizes of a parsed BLIP-2 or InstructBLIP `config.json`."""
    kind = architecture(config, source)
    vision = _eva_vision(config.get("vision_config") or {})
    llm = None
    if kind != RETRIEVAL:
        text = config.get("text_config") or {}
        llm = parse(text, LLMS, f"{source} (text_config)")
    return Blip2Config(
        vit=vision,
        qformer=dataclasses.replace(
            _qformer(config.get("qformer_config") or {}, config.get("num_query_tokens", 32)),
            encoder_width=vision.hidden_size,
        ),
        llm=llm,
        qformer_reads_prompt=kind == INSTRUCT,
        projection_dim=config.get("image_text_hidden_size", 256),
        ln_vision_eps=vision.layer_norm_eps,  # there one key serves both
    )


# ------------------------------------------------------------------------------------- writing


def _write_opt(sizes: OPTConfig) -> dict[str, Any]:
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


def _write_llama(sizes: LlamaConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": sizes.rope.kind, "rope_theta": sizes.rope.theta}
    if sizes.rope.kind != "default":
        rope["factor"] = sizes.rope.factor
    if sizes.rope.kind == "llama3":
        rope |= {
            "low_freq_factor": sizes.rope.low_freq_factor,
            "high_freq_factor": sizes.rope.high_freq_factor,
            "original_max_position_embeddings": sizes.rope.original_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.mlp_dim,
        "hidden_act": sizes.activation,
        "rms_norm_eps": sizes.rms_norm_eps,
        "tie_word_embeddings": sizes.tied_head,
        "rope_parameters": rope,
    }


def _write_t5(sizes: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": sizes.vocab_size,
        "d_model": sizes.hidden_size,
        "num_layers": sizes.num_layers,
        "num_decoder_layers": sizes.num_decoder_layers,
        "num_heads": sizes.num_heads,
        "d_kv": sizes.head_dim,
        "d_ff": sizes.mlp_dim,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": sizes.activation,
        "is_gated_act": True,
        "relative_attention_num_buckets": sizes.relative_buckets,
        "relative_attention_max_distance": sizes.relative_max_distance,
        "layer_norm_epsilon": sizes.rms_norm_eps,
        # False is what both generations of transformers understand as "untied and unscaled".
        "tie_word_embeddings": sizes.tied_head,
        "dropout_rate": sizes.dropout,
        "decoder_start_token_id": sizes.decoder_start_id,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,  # what `generate` begins an empty prompt with
    }


def _write_eva(sizes: ViTConfig) -> dict[str, Any]:
    return {
        "model_type": "blip_2_vision_model",
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.mlp_dim,
        "hidden_act": sizes.activation,
        "layer_norm_eps": sizes.layer_norm_eps,
        "qkv_bias": True,
    }


def _write_clip(sizes: ViTConfig) -> dict[str, Any]:
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


WRITERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    OPTConfig: _write_opt,
    LlamaConfig: _write_llama,
    T5Config: _write_t5,
}


def is_clip(sizes: ViTConfig) -> bool:
    """Whether an encoder has CLIP's parts: a pre-norm, all biases in attention, none on patches."""
    return sizes.pre_norm


def write(sizes: Any) -> dict[str, Any]:
    """The `config.json` that transformers reads for a tower of these sizes."""
    if isinstance(sizes, ViTConfig):
        return _write_clip(sizes) if is_clip(sizes) else _write_eva(sizes)
    return WRITERS[type(sizes)](sizes)


def write_blip2(sizes: Blip2Config, image_token_index: int | None) -> dict[str, Any]:
    """The `config.json` that transformers reads for a BLIP-2 of these sizes.

    Args:
      sizes: the model; its form decides which of the three classes.
      image_token_index: id of the `<image>` placeholder in the tokenizer, which must be below the
        language model's vocabulary size; None leaves it out.
    """
    if is_clip(sizes.vit):
        raise WeightsError(
            "transformers' BLIP-2 has no CLIP image encoder (ViT-L); write --to=lavis instead."
        )
    q = sizes.qformer
    instruct = sizes.qformer_reads_prompt
    qformer: dict[str, Any] = {
        "model_type": "instructblip_qformer" if instruct else "blip_2_qformer",
        "hidden_size": q.hidden_size,
        "num_hidden_layers": q.num_layers,
        "num_attention_heads": q.num_heads,
        "intermediate_size": q.mlp_dim,
        "cross_attention_frequency": q.cross_attention_frequency,
        "encoder_hidden_size": q.encoder_width,
        "vocab_size": q.vocab_size,
        "max_position_embeddings": q.max_position_embeddings,
        "layer_norm_eps": q.layer_norm_eps,
        "hidden_dropout_prob": q.dropout,
        "attention_probs_dropout_prob": q.dropout,
    }
    vision = _write_eva(sizes.vit)
    if instruct:
        kind, vision["model_type"] = INSTRUCT, "instructblip_vision_model"
    else:
        kind = GENERATION if sizes.llm else RETRIEVAL
        qformer["use_qformer_text_input"] = sizes.llm is None
    config = {
        "architectures": [kind],
        "model_type": "instructblip" if instruct else "blip-2",
        "num_query_tokens": q.num_query_tokens,
        "image_text_hidden_size": sizes.projection_dim,
        "vision_config": vision,
        "qformer_config": qformer,
        "text_config": write(sizes.llm) if sizes.llm else {"model_type": "opt"},
    }
    if image_token_index is not None:
        config["image_token_index"] = image_token_index
    return config
