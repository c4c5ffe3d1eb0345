"""The embedded world's image encoder, first part: digit, color and size in every patch.

```bash
blip2 prepare --source=digits --out=runs/towers/data --train=40000 --seed=1
blip2 train --config=configs/digits/vit_easy.py --workdir=runs/towers/vit_easy
```
"""

from ml_collections import ConfigDict

from configs.digits.common import get_config as common


def get_config() -> ConfigDict:
    config = common()
    config.name = "digits-vit-easy"
    config.stage.name = "pretrain_vit"
    # Ten digits, eight colors, two sizes, and the background.
    config.stage.labels = ConfigDict({"digit": 11, "color": 9, "size": 3})
    config.trainable = ("vit", "heads")
    config.model.vit.update(
        {
            "source": "",
            "fingerprint": "",
            "image_size": 64,
            "patch_size": 8,
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "mlp_dim": 512,
            "activation": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "attention_bias": "qkvo",
            "patch_bias": False,
            "pre_norm": True,
        }
    )
    config.steps = 6000
    config.optim.update({"peak_lr": 1e-3, "end_lr": 1e-6, "warmup_steps": 200, "clip_norm": 1.0})
    config.data.dir = "runs/towers/data"
    config.data.batch_size = 48
    config.eval.update({"every": 1000, "batch_size": 100})
    return config
