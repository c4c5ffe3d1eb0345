"""What is computed: the towers, the Q-Former, and BLIP-2's two compositions of them.

No losses, no data, no files. `layers` is what every tower is built from; `blip2` puts the towers
together; `language` is what all language models offer, whatever their family.
"""
