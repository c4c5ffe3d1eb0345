"""Stage 1 of the published models: ITC + ITM + ITG against a frozen image encoder.

```bash
blip2 train --config=configs/stage1.py --workdir=DIR                  ViT-g, the paper's recipe
blip2 train --config=configs/stage1.py:vitl-paper --workdir=DIR       ViT-L
blip2 train --config=configs/stage1.py:vitg-lavis --workdir=DIR       LAVIS's YAML
```
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import published


def get_config(variant: str = "vitg-paper") -> ConfigDict:
    vit, recipe = published.words(variant, tuple(published.VITS), ("paper", "lavis"))
    config = published.get_config(vit)
    config.name = f"stage1-{variant}"
    config.init.bert = "google-bert/bert-base-uncased"  # paper, section 3.1
    config.steps = 250_000  # paper, section 3.4
    config.data.batch_size = {"vitg": 1680, "vitl": 2320}[vit]
    published.web_mixture(config)
    if recipe == "lavis":
        published.lavis_pretraining(config, batch_size=1600, warmup_steps=5000)
    return config


def sweep(add: Callable[..., None]) -> None:
    for rate in (5e-5, 1e-4, 2e-4):
        add(**{"optim.peak_lr": rate})
