"""BLIP-2 in JAX: two-stage vision-language pre-training with a Querying Transformer."""

__version__ = "0.1.0"
