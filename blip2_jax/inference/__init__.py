"""Using a model: the `Blip2` object, its inputs, batches and compiled programs, and decoding."""
