"""BLIP-2 in JAX: two-stage vision-language pre-training with a Querying Transformer.

import blip2_jax

model = blip2_jax.load("Salesforce/blip2-opt-2.7b", dtype="bfloat16")
model.caption(["beach.jpg"])
model.answer(["beach.jpg"], ["How many people are there?"])
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Blip2", "__version__", "load"]

_HOMES = {"load": "pretrained", "Blip2": "inference.pipeline"}


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: jax alone takes a second."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"blip2_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'blip2_jax' has no attribute {name!r}")
