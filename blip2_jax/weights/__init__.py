"""Where weights come from, and where they go: Hugging Face, LAVIS and native checkpoints.

`tables` says which tensor of a published checkpoint is which parameter here, `transfer` moves
tensors by such a table in either direction, `checkpoint` finds out what a folder or file holds.
"""
