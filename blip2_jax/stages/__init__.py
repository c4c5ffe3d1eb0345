"""What is learned: losses and steps, of both stages and of the towers' own pre-training.

Each stage is a module with the same three pure functions, which know nothing of devices:
`loss_fn(params, frozen, batch, key, *, spec)`, `train_step(state, frozen, batch, key, *, spec)` and
`eval_step(params, frozen, batch, *, spec)`.
"""
