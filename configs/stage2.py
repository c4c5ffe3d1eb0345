"""Stage 2 of the published models: captions through a frozen language model.

```bash
blip2 train --config=configs/stage2.py:vitg-opt2.7b-paper --workdir=DIR \\
    --config.init.checkpoint=runs/stage1
blip2 train --config=configs/stage2.py:vitg-flant5xxl-paper --workdir=DIR \\
    --config.init.checkpoint=runs/stage1
blip2 train --config=configs/stage2.py:vitg-opt2.7b-lavis --workdir=DIR \\
    --config.init.checkpoint=blip2_pretrained.pth
```
"""

from ml_collections import ConfigDict

from configs import published


def get_config(variant: str = "vitg-opt2.7b-paper") -> ConfigDict:
    vit, llm, recipe = published.words(
        variant, tuple(published.VITS), tuple(published.LLMS), ("paper", "lavis")
    )
    config = published.get_config(vit, llm)
    config.name = f"stage2-{variant}"
    config.stage.name = "stage2"
    config.trainable = (*published.VISUAL, "language_projection")
    config.init.checkpoint = "runs/stage1"
    config.steps = 80_000  # paper, section 3.4
    config.data.batch_size = 1520 if "flant5" in llm else 1920
    config.optim.end_lr = 5e-5
    published.web_mixture(config)
    if recipe == "lavis":
        published.lavis_pretraining(config, batch_size=1024, warmup_steps=2000)
    return config
