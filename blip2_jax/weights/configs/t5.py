"""T5's `config.json`."""

from typing import Any

from blip2_jax.models.t5 import T5Config
from blip2_jax.weights.configs.fields import Fields, write_tokens


def read(config: Fields) -> T5Config:
    """T5 v1.1; an explicit `dense_act_fn` wins over what `feed_forward_proj` says.

    `tie_word_embeddings` is not reliable: transformers 5 writes True for untied FlanT5s too, and
    the scaling of a tied head as `scale_decoder_outputs`.
    """
    form = config["feed_forward_proj"]
    if not form.startswith("gated-"):
        raise config.error(f"feed_forward_proj is {form!r}; only gated ones (v1.1, Flan)")
    derived = "gelu_new" if form == "gated-gelu" else form.removeprefix("gated-")
    scaled = config["scale_decoder_outputs"]
    if scaled is None:
        scaled = config["tie_word_embeddings"]
    return T5Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["d_model"],
        num_layers=config["num_layers"],
        num_decoder_layers=config["num_decoder_layers"] or config["num_layers"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        activation=config.known_activation(config["dense_act_fn"] or derived, "dense_act_fn"),
        relative_buckets=config["relative_attention_num_buckets"],
        relative_max_distance=config["relative_attention_max_distance"],
        rms_norm_eps=config["layer_norm_epsilon"],
        tied_head=scaled,
        scale_logits=scaled,
        dropout=config["dropout_rate"],
        decoder_start_id=config.token("decoder_start_token_id") or 0,
        eos_token_ids=config.tokens("eos_token_id"),
        pad_token_id=config.token("pad_token_id"),
    )


def write(sizes: T5Config) -> dict[str, Any]:
    """The `config.json` that transformers reads for these sizes."""
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
        **write_tokens(sizes),
        "bos_token_id": 1,  # what `generate` begins an empty prompt with
    }
