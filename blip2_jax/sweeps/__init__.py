"""A sweep: its points and their runs, the backends that run them, and the results of all."""
