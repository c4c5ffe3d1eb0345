"""`config.json` of image encoders: CLIP's, and EVA-CLIP's as in transformers' BLIP-2."""

from typing import Any

from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights.configs.fields import Fields


def read_clip(config: Fields) -> ViTConfig:
    """`CLIPVisionConfig`."""
    return ViTConfig(
        **_read_sizes(config),
        attention_bias="qkvo",
        patch_bias=False,
        pre_norm=True,
        align_corners=True,
    )


def read_eva(config: Fields) -> ViTConfig:
    """`Blip2VisionConfig` and `InstructBlipVisionConfig`."""
    config.refuse("qkv_bias", True)
    return ViTConfig(**_read_sizes(config))


def _read_sizes(config: Fields) -> dict[str, Any]:
    """What the families have in common."""
    config.refuse("num_channels", 3)
    config.heads("hidden_size", "num_attention_heads")
    return {
        "image_size": config.side("image_size"),
        "patch_size": config.side("patch_size"),
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "activation": config.activation("hidden_act"),
        "layer_norm_eps": config["layer_norm_eps"],
    }


def is_clip(sizes: ViTConfig) -> bool:
    """Whether an encoder has CLIP's parts: a pre-norm, all biases in attention, none on patches."""
    return sizes.pre_norm


def write(sizes: ViTConfig) -> dict[str, Any]:
    """The document of an encoder of these sizes."""
    if is_clip(sizes):
        kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
        return {**kind, **_write_sizes(sizes)}
    return {"model_type": "blip_2_vision_model", **_write_sizes(sizes), "qkv_bias": True}


def _write_sizes(sizes: ViTConfig) -> dict[str, Any]:
    return {
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.mlp_dim,
        "hidden_act": sizes.activation,
        "layer_norm_eps": sizes.layer_norm_eps,
    }
