"""Hugging Face `config.json` files as sizes here, and back."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from blip2_jax.models.blip2 import Blip2Config, LLMConfig
from blip2_jax.models.layers import ACTIVATIONS
from blip2_jax.models.llama import ROPE_KINDS, LlamaConfig, RopeConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights.defaults import DEFAULTS
from blip2_jax.weights.files import WeightsError

# Names of transformers' classes, of any age, whose weights and computation are a family's.
ARCHITECTURES = {
    "opt": r"OPT(Model|For\w+)",
    "llama": r"(Llama|LLaMA)(Model|For\w+)",
    "t5": r"T5(Model|For\w+|WithLMHeadModel)",
    "clip_vision_model": r"CLIP(Model|VisionModel\w*|For\w+)",
    "blip_2_vision_model": r"Blip2VisionModel",
    "instructblip_vision_model": r"InstructBlipVisionModel",
}

# Keys of related families that change what is computed, beside a value that changes nothing.
FOREIGN: dict[str, Mapping[str, Any]] = {
    "llama": {
        "sliding_window": None,  # Mistral
        "embedding_multiplier": 1.0,  # Granite, and the three below
        "attention_multiplier": None,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "hidden_activation": None,  # Gemma, and the three below
        "query_pre_attn_scalar": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "clip_qkv": None,  # OLMo
        "no_rope_layers": None,  # SmolLM3
        "num_local_experts": None,  # Mixtral
        "use_qk_norm": False,
    },
    "t5": {"num_experts": None},  # Switch Transformers
}


SIZES = (  # whose default follows from others, and which must be whole numbers like them
    "word_embed_proj_dim", "num_key_value_heads", "head_dim", "num_decoder_layers",
    "original_max_position_embeddings",
)  # fmt: skip


class Fields:
    """A parsed `config.json`, with its family's defaults for what it leaves out.

    Args:
      config: the JSON document.
      family: a `DEFAULTS` name.
      source: named in errors.

    Raises:
      WeightsError: `architectures`, or a key that this family does not have, says that the file is
        of another family; the weights are quantized.
    """

    def __init__(self, config: Mapping[str, Any], family: str, source: str):
        self.family, self.source = family, source
        self._config, self._defaults = config, DEFAULTS[family]
        pattern = ARCHITECTURES.get(family, r".*")
        for name in config.get("architectures") or ():
            if not re.fullmatch(pattern, name):
                raise self.error(
                    f"architectures names {name}, a class that computes something else. Leave the "
                    "file as it was published, and take another model"
                )
        for key, neutral in FOREIGN.get(family, {}).items():
            if config.get(key) not in (None, neutral):
                raise self.error(f"{key} is {config[key]!r}; a {family} has no such key")
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise self.error(f"the weights are quantized ({method}); take the original")

    def error(self, problem: str) -> WeightsError:
        """An error that names the file."""
        return WeightsError(f"{self.source}: config.json of a {self.family}: {problem}.")

    def says(self, key: str) -> bool:
        """Whether the file itself has a value for a key."""
        return self._config.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        """A key's value, of the type that its default has."""
        default = self._defaults[key]
        value = self._config.get(key)
        if value is None:
            return default
        if default is None and key not in SIZES:
            return value
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        wanted = int if default is None else type(default)
        if type(value) is not wanted:
            raise self.error(f"{key} is {value!r}, which is no {wanted.__name__}")
        if isinstance(value, int) and value < 1 and not isinstance(value, bool):
            raise self.error(f"{key} is {value}; it must be at least 1")
        return value

    def activation(self, key: str) -> str:
        """The name of an activation that is known."""
        return self.known_activation(self[key], key)

    def known_activation(self, name: Any, key: str) -> str:
        """`name`, checked to be an activation that is known."""
        if name not in ACTIVATIONS:
            raise self.error(f"{key} is {name!r}; known: {', '.join(ACTIVATIONS)}")
        return str(name)

    def refuse(self, key: str, only: Any) -> None:
        """Raises if a key has another value than the only one that is supported."""
        if self[key] != only:
            raise self.error(f"{key} is {self[key]!r}; only {only!r} is supported")

    def heads(self, width: str, heads: str) -> int:
        """Width of a head, where the heads share the model's width."""
        size, rest = divmod(self[width], self[heads])
        if rest:
            raise self.error(f"{width} {self[width]} is not a multiple of {heads} {self[heads]}")
        return int(size)

    def side(self, key: str) -> int:
        """A side in pixels, which a file may give as a pair of equal ones."""
        value = self._config.get(key)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                raise self.error(f"{key} is {value}; images and patches are squares here")
            return Fields({key: value[0]}, self.family, self.source).side(key)
        return int(self[key])

    def token(self, key: str) -> int | None:
        """A token's id; None where there is none (files of 2023 say -1)."""
        value = self._config.get(key, self._defaults[key])
        if value is None or value == -1:
            return None
        return self._id(key, value)

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids that stand alone or in a list."""
        value = self._config.get(key, self._defaults[key])
        several = value if isinstance(value, list) else [] if value in (None, -1) else [value]
        return tuple(self._id(key, item) for item in several)

    def _id(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(f"{key} is {value!r}, which is no token's id")
        return value


def family_of(config: Mapping[str, Any], known: Iterable[str], source: str) -> str:
    """The `model_type` of a parsed `config.json`, checked to be one of `known`."""
    family = config.get("model_type")
    names = tuple(known)
    if family not in names:
        raise WeightsError(f"{source}: model_type {family!r}; known: {', '.join(names)}.")
    return str(family)


def parse(
    config: Mapping[str, Any],
    known: Mapping[str, Callable[[Fields], Any]],
    source: str,
) -> Any:
    """Sizes of a parsed `config.json`.

    Args:
      config: the JSON document.
      known: model_type -> reader, `LLMS` or `VITS`.
      source: named in errors.
    """
    family = family_of(config, known, source)
    return known[family](Fields(config, family, source))


def _opt(config: Fields) -> OPTConfig:
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
        # Nothing said is nothing said: BLIP-2 ends an OPT's text by a newline, not as the class.
        eos_token_ids=config.tokens("eos_token_id") if config.says("eos_token_id") else (),
        pad_token_id=config.token("pad_token_id"),
    )


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
    # transformers lets the key beside win over the key inside.
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

    if kind == "default" or kind == "dynamic":  # which stretches nothing up to the longest text
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
        scale = lambda m=1.0: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
        both = rope.get("mscale"), rope.get("mscale_all_dim")
        magnitude = scale(both[0]) / scale(both[1]) if all(both) else scale()
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=factor,
            low_freq_factor=rope.get("beta_slow") or 1.0,
            high_freq_factor=rope.get("beta_fast") or 32.0,
            original_length=original,
            truncate=rope.get("truncate", True),
            magnitude=_given(rope, "attention_factor", magnitude),
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


def _given(rope: Mapping[str, Any], key: str, otherwise: float) -> float:
    return otherwise if rope.get(key) is None else float(rope[key])


def _llama(config: Fields) -> LlamaConfig:
    if config["attention_bias"] or config["mlp_bias"]:
        raise config.error("biases (attention_bias, mlp_bias) are not supported")
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise config.error(f"{heads} heads cannot share {kv_heads} heads of keys evenly")
    head_dim = config["head_dim"] or config.heads("hidden_size", "num_attention_heads")
    rope = _rope(config, head_dim)
    longest = config["max_position_embeddings"]
    if rope.kind == "longrope":  # longer texts than this turn by other factors
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


def _t5(config: Fields) -> T5Config:
    """T5 v1.1; an explicit `dense_act_fn` wins over what `feed_forward_proj` says.

    `tie_word_embeddings` is no witness: transformers 5 writes True for untied FlanT5s too, and
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


def _clip_vision(config: Fields) -> ViTConfig:
    config.refuse("num_channels", 3)
    config.heads("hidden_size", "num_attention_heads")
    return ViTConfig(
        image_size=config.side("image_size"),
        patch_size=config.side("patch_size"),
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        activation=config.activation("hidden_act"),
        layer_norm_eps=config["layer_norm_eps"],
        attention_bias="qkvo",
        patch_bias=False,
        pre_norm=True,
        align_corners=True,
    )


def _eva_vision(config: Fields) -> ViTConfig:
    """`Blip2VisionConfig` and `InstructBlipVisionConfig`."""
    config.refuse("num_channels", 3)
    config.refuse("qkv_bias", True)
    config.heads("hidden_size", "num_attention_heads")
    return ViTConfig(
        image_size=config.side("image_size"),
        patch_size=config.side("patch_size"),
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        activation=config.activation("hidden_act"),
        layer_norm_eps=config["layer_norm_eps"],
    )


def _qformer(config: Fields, num_query_tokens: int, encoder_width: int) -> QFormerConfig:
    """`Blip2QFormerConfig` and `InstructBlipQFormerConfig`."""
    config.refuse("hidden_act", "gelu")
    config.refuse("position_embedding_type", "absolute")
    config.heads("hidden_size", "num_attention_heads")
    return QFormerConfig(
        num_query_tokens=num_query_tokens,
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        cross_attention_frequency=config["cross_attention_frequency"],
        encoder_width=encoder_width,  # whatever its own key says, as in transformers
        vocab_size=config["vocab_size"],
        bos_token_id=config["vocab_size"] - 1,
        max_position_embeddings=config["max_position_embeddings"],
        layer_norm_eps=config["layer_norm_eps"],
        dropout=config["hidden_dropout_prob"],
    )


LLMS = {"opt": _opt, "llama": _llama, "t5": _t5}
FAMILIES: dict[type, str] = {OPTConfig: "opt", LlamaConfig: "llama", T5Config: "t5"}
VITS = {
    "clip_vision_model": _clip_vision,
    "blip_2_vision_model": _eva_vision,
    "instructblip_vision_model": _eva_vision,
}

GENERATION, RETRIEVAL, INSTRUCT = (
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "InstructBlipForConditionalGeneration",
)


def architecture(config: Mapping[str, Any], source: str) -> str:
    """Which of the three BLIP-2 classes of transformers a parsed `config.json` is for."""
    family = family_of(config, ("blip-2", "instructblip"), source)
    instruct = family == "instructblip"
    name = (config.get("architectures") or [INSTRUCT if instruct else GENERATION])[0]
    kinds = {"InstructBlipModel": INSTRUCT, INSTRUCT: INSTRUCT} if instruct else {
        "Blip2Model": GENERATION, GENERATION: GENERATION, RETRIEVAL: RETRIEVAL,
    }  # fmt: skip
    if name not in kinds:
        raise WeightsError(f"{source}: architecture {name!r}; known: {', '.join(kinds)}.")
    return kinds[name]


def part(config: Mapping[str, Any], key: str, families: tuple[str, ...], source: str) -> Fields:
    """A nested config (`vision_config`, ...), with its own family's defaults.

    Args:
      config: the whole document.
      key: of the part.
      families: the families it may be of; the first where it does not say.
      source: named in errors.
    """
    inner = config.get(key) or {}
    source = f"{source} ({key})"
    family = family_of({"model_type": families[0], **inner}, families, source)
    return Fields(inner, family, source)


def parse_text(config: Mapping[str, Any], source: str) -> Any:
    """Sizes of the language model inside a parsed BLIP-2 `config.json`."""
    text = {"model_type": "opt", **(config.get("text_config") or {})}  # transformers' default
    return parse(text, LLMS, f"{source} (text_config)")


def parse_blip2(config: Mapping[str, Any], source: str) -> Blip2Config:
    """Sizes of a parsed BLIP-2 or InstructBLIP `config.json`."""
    kind = architecture(config, source)
    instruct = kind == INSTRUCT
    whole = Fields(config, "instructblip" if instruct else "blip-2", source)
    name = "instructblip" if instruct else "blip_2"
    vision = _eva_vision(part(config, "vision_config", (f"{name}_vision_model",), source))
    qformer = part(config, "qformer_config", (f"{name}_qformer",), source)
    return Blip2Config(
        vit=vision,
        qformer=_qformer(qformer, whole["num_query_tokens"], vision.hidden_size),
        llm=None if kind == RETRIEVAL else parse_text(config, source),
        qformer_reads_prompt=instruct,
        projection_dim=whole["image_text_hidden_size"],
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
        "enable_bias": sizes.bias,
        "tie_word_embeddings": sizes.tied_head,
        **_write_tokens(sizes),
    }


def _write_tokens(sizes: LLMConfig) -> dict[str, Any]:
    """Begin, end and padding; what was not said is left to the class."""
    eos = sizes.eos_token_ids
    found: dict[str, Any] = {"bos_token_id": sizes.bos_token_id, "pad_token_id": sizes.pad_token_id}
    if eos:
        found["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
    return found


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


def _write_llama(sizes: LlamaConfig) -> dict[str, Any]:
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
        **_write_tokens(sizes),
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
        **_write_tokens(sizes),
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
