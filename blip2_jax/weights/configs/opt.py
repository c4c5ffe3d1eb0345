"""OPT's `config.json`."""

from typing import Any

from blip2_jax.models.opt import OPTConfig
from blip2_jax.weights.configs.fields import Fields, write_tokens


def read(config: Fields) -> OPTConfig:
    """The sizes of a parsed `config.json`."""
    width = config["hidden_size"]
    if not config["do_layer_norm_before"] or config["_remove_final_layer_norm"]:
        raise config.error("OPT-350m's post-norm layers are not supported; take another size")
    if config["word_embed_proj_dim"] not in (None, width):
        raise config.error("projected word embeddings (word_embed_proj_dim) are not supported")
    config.refuse("layer_norm_elementwise_affine", True)
    config.heads("hidden_size", "num_attention_heads")
    return OPTConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        ffn_dim=config["ffn_dim"],
        max_position_embeddings=config["max_position_embeddings"],
        activation=config.activation("activation_function"),
        dropout=config["dropout"],
        bias=config["enable_bias"],
        tied_head=config["tie_word_embeddings"],
        bos_token_id=config.token("bos_token_id"),
        # Left empty where the file has none: BLIP-2 ends an OPT's text by a newline.
        eos_token_ids=config.tokens("eos_token_id") if config.has("eos_token_id") else (),
        pad_token_id=config.token("pad_token_id"),
    )


def write(sizes: OPTConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads for these sizes."""
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
        "enable_bias": sizes.bias,
        "tie_word_embeddings": sizes.tied_head,
        **write_tokens(sizes),
    }
