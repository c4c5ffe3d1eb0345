"""The embedded world's language model: whole stories, continued from `lm_easy.py`.

```bash
blip2 train --config=configs/digits/lm.py --workdir=runs/towers/lm \\
    --config.init.checkpoint=runs/towers/lm_easy
blip2 convert runs/towers/lm blip2_jax/assets/digits-opt --to=huggingface
```
"""

from ml_collections import ConfigDict

from configs.digits.lm_easy import get_config as easy


def get_config() -> ConfigDict:
    config = easy()
    config.name = "digits-lm"
    config.init.checkpoint = "runs/towers/lm_easy"
    config.steps = 4000
    config.optim.update({"peak_lr": 1e-3, "end_lr": 1e-6, "warmup_steps": 200})
    config.data.source = "stories"
    config.data.story_warmup = 0.1
    config.data.batch_size = 48
    config.data.llm_length = 128
    config.eval.update({"every": 500, "batches": 5, "batch_size": 100})
    return config
