"""A training run: what it is made of, where it begins, its steps, and the losses it evaluates.

`setup` builds what a config asks for, `identity` says what must stay the same for a run to go on,
`start` makes the first state, `loop` does the steps, `eval_losses` computes the stage's metrics on
other data, and `overview` describes a run.
"""
