"""What transformers takes for a key that a `config.json` leaves out, one table a family.

Files leave keys out: transformers 4.36 to 4.48 wrote only what differs from the class's own
defaults, inside `text_config` and its siblings too. Every key that is read stands here; tests hold
the values equal to those of transformers' classes. None: no value, or one that follows from others.
"""

from collections.abc import Mapping
from typing import Any

_VISION: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_size": 1408,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}

_QFORMER: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "position_embedding_type": "absolute",
}

_COMPOSITE: dict[str, Any] = {
    "vision_config": None,
    "qformer_config": None,
    "text_config": None,
    "num_query_tokens": 32,
    "image_text_hidden_size": 256,
}

DEFAULTS: dict[str, Mapping[str, Any]] = {
    "opt": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "dropout": 0.1,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": None,
        # Before transformers 5: what `rope_parameters` is made of.
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "original_max_position_embeddings": None,
        "partial_rotary_factor": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    "t5": {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "dense_act_fn": None,
        "tie_word_embeddings": True,
        "scale_decoder_outputs": None,
        "decoder_start_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "clip_vision_model": {
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "blip_2_vision_model": _VISION,
    "instructblip_vision_model": _VISION,
    "blip_2_qformer": _QFORMER,
    "instructblip_qformer": _QFORMER,
    "blip-2": _COMPOSITE,
    "instructblip": _COMPOSITE,
}
