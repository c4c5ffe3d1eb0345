"""Hugging Face `config.json` files as sizes here, and back; one module a family."""

from blip2_jax.weights.configs.blip2 import (
    GENERATION,
    INSTRUCT,
    RETRIEVAL,
    parse_blip2,
    parse_text,
    part,
    write_blip2,
)
from blip2_jax.weights.configs.fields import Fields, parse
from blip2_jax.weights.configs.towers import LLMS, VITS, write
from blip2_jax.weights.configs.vit import is_clip

__all__ = [
    "GENERATION",
    "INSTRUCT",
    "LLMS",
    "RETRIEVAL",
    "VITS",
    "Fields",
    "is_clip",
    "parse",
    "parse_blip2",
    "parse_text",
    "part",
    "write",
    "write_blip2",
]
