"""Where parameters lie unless a config says otherwise; not in `mesh`, for configs need no jax."""

# Which mesh axis each logical axis of a parameter lies on.
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
