"""Llama's `config.json`, with both generations of its rotary scaling."""

import math
from collections.abc import Mapping
from typing import Any

from blip2_jax.models.llama import ROPE_KINDS, LlamaConfig, RopeConfig
from blip2_jax.weights.configs.fields import Fields, write_tokens


def _rope(config: Fields, head_dim: int) -> RopeConfig:
    """Both generations: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""
    rope = config["rope_scaling"] or config["rope_parameters"] or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise config.error("rope_parameters that differ by layer are not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise config.error(f"rotary scaling {kind!r}; known: {', '.join(ROPE_KINDS)}")
    if (rope.get("partial_rotary_factor") or config["partial_rotary_factor"] or 1.0) != 1.0:
        raise config.error("a partial_rotary_factor is not supported")
    longest = config["max_position_embeddings"]
    # In transformers the top-level key wins over the one inside.
    original = (
        config["original_max_position_embeddings"]
        or rope.get("original_max_position_embeddings")
        or longest
    )
    theta = rope.get("rope_theta") or config["rope_theta"]

    def number(key: str) -> float:
        if not isinstance(rope.get(key), (int, float)):
            raise config.error(f"rotary scaling {kind!r} without a number for {key!r}")
        return float(rope[key])

    if kind == "default" or kind == "dynamic":  # the latter changes nothing up to the longest text
        return RopeConfig(theta=theta, kind=kind, factor=rope.get("factor") or 1.0)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_length=original,
        )
    factor = number("factor") if rope.get("factor") is not None else longest / original
    if kind == "yarn":
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=factor,
            low_freq_factor=rope.get("beta_slow") or 1.0,
            high_freq_factor=rope.get("beta_fast") or 32.0,
            original_length=original,
            truncate=rope.get("truncate", True),
            magnitude=_given(rope, "attention_factor", _yarn_magnitude(rope, factor)),
        )
    short = rope.get("short_factor")
    if not isinstance(short, list) or len(short) != head_dim // 2:
        raise config.error(f"rotary scaling {kind!r} needs {head_dim // 2} numbers in short_factor")
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_length=original,
        divisors=tuple(map(float, short)),
        long_divisors=tuple(map(float, rope.get("long_factor") or short)),
        magnitude=_given(rope, "attention_factor", magnitude),
    )


def _yarn_magnitude(rope: Mapping[str, Any], factor: float) -> float:
    """YaRN's attention factor where none is given (transformers, `_compute_yarn_parameters`)."""

    def scale(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    if numerator and denominator:
        return scale(numerator) / scale(denominator)
    return scale()


def _given(rope: Mapping[str, Any], key: str, otherwise: float) -> float:
    return otherwise if rope.get(key) is None else float(rope[key])


def read(config: Fields) -> LlamaConfig:
    """The sizes of a parsed `config.json`."""
    if config["attention_bias"] or config["mlp_bias"]:
        raise config.error("biases (attention_bias, mlp_bias) are not supported")
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise config.error(f"{heads} heads cannot share {kv_heads} heads of keys evenly")
    head_dim = config["head_dim"] or config.heads("hidden_size", "num_attention_heads")
    rope = _rope(config, head_dim)
    longest = config["max_position_embeddings"]
    if rope.kind == "longrope":  # longer texts use other factors
        longest = min(longest, rope.original_length)
    bos, eos = config.token("bos_token_id"), config.tokens("eos_token_id")
    if (bos, eos) == (0, (1,)):
        # The first conversions of LLaMA wrote these (and the hub's InstructBLIP still has them);
        # its vocabulary has <unk>, <s>, </s> as 0, 1, 2.
        bos, eos = 1, (2,)
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=config["intermediate_size"],
        activation=config.activation("hidden_act"),
        max_position_embeddings=longest,
        rms_norm_eps=config["rms_norm_eps"],
        tied_head=config["tie_word_embeddings"],
        rope=rope,
        bos_token_id=bos,
        eos_token_ids=eos,
        pad_token_id=config.token("pad_token_id"),
    )


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    document: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        document["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        document["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        document |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.kind == "yarn":
        document |= {
            "beta_slow": rope.low_freq_factor,
            "beta_fast": rope.high_freq_factor,
            "truncate": rope.truncate,
        }
    if rope.kind == "longrope":
        document |= {
            "short_factor": list(rope.divisors),
            "long_factor": list(rope.long_divisors),
        }
    if rope.kind in ("yarn", "longrope"):
        document["attention_factor"] = rope.magnitude
    return document


def write(sizes: LlamaConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads for these sizes."""
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
        "max_position_embeddings": sizes.max_position_embeddings,
        "rope_parameters": _write_rope(sizes.rope),
        **write_tokens(sizes),
    }
