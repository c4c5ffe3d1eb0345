"""How a run is run: devices, state, optimizer, checkpoints, metrics.

Nothing in here knows BLIP-2, and nothing in here imports another package of `blip2_jax`.
"""
