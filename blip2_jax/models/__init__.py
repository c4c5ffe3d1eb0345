"""The models: vision transformer, Q-Former, language models, and BLIP-2's two compositions of them.

No losses, no data, no files. `layers` and `attention` are what every tower is built from; `blip2`
composes them; `language` is the interface of all language models, `kv_cache` their cache.
"""
