"""The default sharding rules; apart from `mesh`, because configs are read without jax."""

# Logical axis of a parameter -> the mesh axis that splits it.
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
