"""`config.json` of transformers' BLIP-2 and InstructBLIP classes: the towers and the Q-Former."""

from collections.abc import Mapping
from typing import Any

from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.weights.configs import towers, vit
from blip2_jax.weights.configs.fields import Fields, family_of, parse
from blip2_jax.weights.files import WeightsError

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
    return parse(text, towers.LLMS, f"{source} (text_config)")


def parse_blip2(config: Mapping[str, Any], source: str) -> Blip2Config:
    """Sizes of a parsed BLIP-2 or InstructBLIP `config.json`."""
    kind = architecture(config, source)
    instruct = kind == INSTRUCT
    whole = Fields(config, "instructblip" if instruct else "blip-2", source)
    name = "instructblip" if instruct else "blip_2"
    vision = vit.read_eva(part(config, "vision_config", (f"{name}_vision_model",), source))
    qformer = part(config, "qformer_config", (f"{name}_qformer",), source)
    return Blip2Config(
        vit=vision,
        qformer=_read_qformer(qformer, whole["num_query_tokens"], vision.hidden_size),
        llm=None if kind == RETRIEVAL else parse_text(config, source),
        qformer_reads_prompt=instruct,
        projection_dim=whole["image_text_hidden_size"],
        ln_vision_eps=vision.layer_norm_eps,  # one key for both in transformers
    )


def _read_qformer(config: Fields, num_query_tokens: int, encoder_width: int) -> QFormerConfig:
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
        encoder_width=encoder_width,  # its own key is ignored, as in transformers
        vocab_size=config["vocab_size"],
        bos_token_id=config["vocab_size"] - 1,
        max_position_embeddings=config["max_position_embeddings"],
        layer_norm_eps=config["layer_norm_eps"],
        dropout=config["hidden_dropout_prob"],
    )


def write_blip2(sizes: Blip2Config, image_token_index: int | None) -> dict[str, Any]:
    """The `config.json` that transformers reads for a BLIP-2 of these sizes.

    Args:
      sizes: the model; its form decides which of the three classes.
      image_token_index: id of the `<image>` placeholder in the tokenizer, which must be below the
        language model's vocabulary size; None leaves it out.
    """
    if vit.is_clip(sizes.vit):
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
    vision = vit.write(sizes.vit)
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
        "text_config": towers.write(sizes.llm) if sizes.llm else {"model_type": "opt"},
    }
    if image_token_index is not None:
        config["image_token_index"] = image_token_index
    return config
