"""Captioning on COCO (paper, table 7): the image encoder is trained too, at 364 pixels.

```bash
blip2 train --config=configs/finetune_caption.py:vitg-opt2.7b --workdir=DIR \\
    --config.init.checkpoint=runs/stage2
blip2 train --config=configs/finetune_caption.py:vitg-opt2.7b-lavis --workdir=DIR \\
    --config.init.checkpoint=blip2_pretrained_opt2.7b.pth
```

The second is LAVIS's `caption_coco_ft.yaml`.
"""

from ml_collections import ConfigDict

from configs import published

DECAY = {"opt6.7b": 0.95}  # of the encoder's rates, by block; 1 for the others


def get_config(variant: str = "vitg-opt2.7b") -> ConfigDict:
    vit, llm, recipe = published.words(
        variant, tuple(published.VITS), tuple(published.LLMS), ("", "lavis")
    )
    config = published.get_config(vit, llm)
    config.name = f"caption-{variant}"
    config.stage.name = "stage2"
    config.trainable = (*published.VISUAL, "language_projection")
    config.init.checkpoint = "runs/stage2"
    published.finetune(config, batch_size=256, samples=published.COCO_CAPTIONS)
    config.model.vit.resolution = 364
    config.optim.vit_layer_decay = DECAY.get(llm, 1.0)
    config.data.update({"source": "coco", "dir": "data/coco", "form": "caption"})
    config.data.prompt = "a photo of"
    if recipe == "lavis":
        published.lavis(config, batch_size=256, samples=published.COCO_CAPTIONS, epochs=5)
    return config
