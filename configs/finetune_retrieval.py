"""Image-text retrieval on COCO (paper, table 9): stage 1's losses, the encoder trained, 364 pixels.

```bash
blip2 train --config=configs/finetune_retrieval.py:vitg --workdir=DIR \\
    --config.init.checkpoint=runs/stage1
blip2 train --config=configs/finetune_retrieval.py:vitg-lavis --workdir=DIR \\
    --config.init.checkpoint=blip2_pretrained.pth
```

The second is LAVIS's `retrieval_coco_ft.yaml`. Texts have 32 tokens in training, as there, and 35
in the evaluation.
"""

from ml_collections import ConfigDict

from configs import published


def get_config(variant: str = "vitg") -> ConfigDict:
    vit, recipe = published.words(variant, tuple(published.VITS), ("", "lavis"))
    config = published.get_config(vit)
    config.name = f"retrieval-{variant}"
    config.init.checkpoint = "runs/stage1"
    published.finetune(config, batch_size=224, samples=published.COCO_CAPTIONS)
    config.model.vit.resolution = 364
    config.data.update({"source": "coco", "dir": "data/coco", "form": "caption"})
    if recipe == "lavis":
        published.lavis(config, batch_size=224, samples=published.COCO_CAPTIONS, epochs=5)
    elif vit == "vitg":
        config.optim.vit_layer_decay = 0.95
    else:
        config.optim.update({"peak_lr": 5e-6, "betas": (0.9, 0.98)})
    return config
