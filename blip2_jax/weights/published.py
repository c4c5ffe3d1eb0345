"""Sizes of the towers that the published models are made of, by their names on the hub.

Facts of their `config.json` files, so that a recipe can be checked, planned and counted without a
network and without weights. Reading weights takes the folder itself.
"""

from typing import Any


def _opt(width: int, ffn: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": ffn,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "dropout": 0.1,
    }


def _flan_t5(width: int, ffn: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_ff": ffn,
        "d_kv": 64,
        "num_heads": heads,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",  # exact GELU: LAVIS and BLIP-2 override FlanT5's own
        "tie_word_embeddings": False,
        "dropout_rate": 0.1,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "facebook/opt-2.7b": _opt(2560, 10240),
    "facebook/opt-6.7b": _opt(4096, 16384),
    "google/flan-t5-xl": _flan_t5(2048, 5120, 32),
    "google/flan-t5-xxl": _flan_t5(4096, 10240, 64),
    "lmsys/vicuna-7b-v1.1": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
    },
    "lmsys/vicuna-13b-v1.1": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "rms_norm_eps": 1e-6,
    },
    "openai/clip-vit-large-patch14": {
        "model_type": "clip_vision_model",
        "image_size": 224,
        "patch_size": 14,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    # The smallest repository that holds EVA-CLIP's ViT-g as BLIP-2 uses it: 39 of its 40 blocks.
    "Salesforce/blip2-itm-vit-g": {"model_type": "blip-2", "vision_config": {}},
}
