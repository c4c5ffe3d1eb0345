"""Weights in and out: Hugging Face, LAVIS and native checkpoints.

```
files        named tensors, read piece by piece: safetensors, and torch's .bin and .pth
rows         name tables: which tensor of a checkpoint is which parameter here
tables       one table a family and format
transfer     moves tensors by such a table, in either direction
configs      `config.json` of each family, read and written
images       `preprocessor_config.json`, read and written
positions    position embeddings for another image size
huggingface  folders of towers and whole models, in transformers' form
lavis        LAVIS's .pth files
checkpoint   a whole model in any of the formats
bert         initialization of the Q-Former from BERT
published    sizes of the published towers
```
"""
