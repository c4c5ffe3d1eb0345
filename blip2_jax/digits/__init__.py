"""The embedded world: scenes of handwritten digits, with all that only they need.

`world` describes scenes, captions and questions, and says whether a caption is true; `drawing`
draws scenes; `dataset` and `prepare` write them to disk. `stories` and `patches` are what the small
language model and image encoder are pre-trained on, by `pretrain_lm` and `pretrain_vit`.

The rest of the package names these modules as text, in tables (`stages.STAGES`,
`data.batch_spec.EXAMPLE_MAKERS`, ...), and works without this folder.
"""
