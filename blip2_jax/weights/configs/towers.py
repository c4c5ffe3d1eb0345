"""Which family reads and writes the `config.json` of which tower."""

from collections.abc import Callable
from typing import Any

from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.models.vit import ViTConfig
from blip2_jax.weights.configs import llama, opt, t5, vit

# model_type -> reader, for `fields.parse`.
LLMS = {"opt": opt.read, "llama": llama.read, "t5": t5.read}
VITS = {
    "clip_vision_model": vit.read_clip,
    "blip_2_vision_model": vit.read_eva,
    "instructblip_vision_model": vit.read_eva,
}
WRITERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    OPTConfig: opt.write,
    LlamaConfig: llama.write,
    T5Config: t5.write,
    ViTConfig: vit.write,
}


def write(sizes: Any) -> dict[str, Any]:
    """The `config.json` that transformers reads for a tower of these sizes."""
    return WRITERS[type(sizes)](sizes)
