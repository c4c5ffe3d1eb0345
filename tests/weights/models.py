"""Small random models of transformers, one of every published form, saved as users find them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VISION = {
    "hidden_size": 176,  # two heads of 88, as ViT-g's sixteen are
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
QFORMER = {
    "vocab_size": 61,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "encoder_hidden_size": 176,
    "max_position_embeddings": 20,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 70,
    "hidden_size": 160,  # two heads of 80, as OPT-2.7B's are
    "word_embed_proj_dim": 160,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 60,
    "dropout": 0.0,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 70,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
    "bos_token_id": 1,
    "decoder_start_token_id": 0,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 60,
    "pad_token_id": 0,
}
TEXT = {"opt": OPT, "t5": T5, "llama": LLAMA}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter a value that matters: transformers leaves queries and biases at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            last = name.rsplit(".", 1)[-1]
            if parameter.ndim == 1 and last == "weight":  # of a norm
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(0.7 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.1 * noise)
            if name.endswith("qkv.bias"):
                third = len(parameter) // 3
                parameter[third : 2 * third] = 0  # EVA has no bias of keys
    return model.eval()


def generation(llm: str = "opt", **vision) -> torch.nn.Module:
    """`Blip2ForConditionalGeneration`."""
    config = transformers.Blip2Config(
        vision_config=VISION | vision,
        qformer_config=QFORMER | {"use_qformer_text_input": False},
        text_config=TEXT[llm],
        num_query_tokens=5,
        image_token_index=69,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    if llm == "t5":  # transformers 5 ties what the config unties
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    return randomize(model)


def retrieval(**vision) -> torch.nn.Module:
    """`Blip2ForImageTextRetrieval`."""
    config = transformers.Blip2Config(
        vision_config=VISION | vision,
        qformer_config=QFORMER | {"use_qformer_text_input": True},
        text_config={"model_type": "opt"},
        num_query_tokens=5,
        image_text_hidden_size=24,
    )
    config.image_token_index = None
    return randomize(transformers.Blip2ForImageTextRetrieval(config))


def instruct(llm: str = "llama", vocab_size: int = 0, **vision) -> torch.nn.Module:
    """`InstructBlipForConditionalGeneration`; `vocab_size`: of both vocabularies."""
    words = {"vocab_size": vocab_size} if vocab_size else {}
    config = transformers.InstructBlipConfig(
        vision_config=VISION | vision,
        qformer_config=QFORMER | words,
        text_config=TEXT[llm] | words,
        num_query_tokens=5,
        image_token_index=69,
    )
    return randomize(transformers.InstructBlipForConditionalGeneration(config))


FORMS = {
    "opt": lambda: generation("opt"),
    "t5": lambda: generation("t5"),
    "llama": lambda: generation("llama"),
    "retrieval": retrieval,
    "instruct": instruct,
}


def differences(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """What transformers 4.36 to 4.48 wrote, and so the hub has: what is not the class's default.

    A default that follows from others (T5's decoder layers) is none.
    """
    fields = vars(type(config))
    defaults = {k: v for k, v in type(config)().to_dict().items() if fields.get(k, v) is not None}
    document = {
        key: value
        for key, value in config.to_dict().items()
        if key == "model_type" or value not in (None, defaults.get(key))
    }
    for key in ("vision_config", "qformer_config", "text_config"):
        if key in document:
            document[key] = differences(getattr(config, key))
    return earlier(json.loads(json.dumps(document)))


def earlier(document: dict[str, Any]) -> dict[str, Any]:
    """A parsed config with the names of before transformers 5; the document itself is changed."""
    rope = dict(document.pop("rope_parameters", None) or {})
    if rope:
        document["rope_theta"] = rope.pop("rope_theta", 10000.0)
        kind = rope.pop("rope_type", "default")
        document["rope_scaling"] = {**rope, "type": kind} if kind != "default" else None
    if document["model_type"] == "t5":  # tied or not was what said whether logits are scaled
        document["tie_word_embeddings"] = document.pop("scale_decoder_outputs", True)
    return document


def hub_form(folder: Path) -> None:
    """Rewrites a saved folder's `config.json` as the hub has it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    architectures = json.loads((folder / "config.json").read_text())["architectures"]
    document = {**differences(config), "architectures": architectures}
    (folder / "config.json").write_text(json.dumps(document, indent=2))
