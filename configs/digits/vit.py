"""The embedded world's image encoder, second part, after `vit_easy.py`: places, too.

    blip2 train --config=configs/digits/vit.py --workdir=runs/towers/vit \\
        --config.init.checkpoint=runs/towers/vit_easy
    blip2 convert runs/towers/vit blip2_jax/assets/digits-vit --to=huggingface

An encoder that is trained on digits and colors alone loses their positions, which those of the hub
keep.
"""

from ml_collections import ConfigDict

from configs.digits.vit_easy import get_config as easy


def get_config() -> ConfigDict:
    config = easy()
    config.name = "digits-vit"
    config.init.checkpoint = "runs/towers/vit_easy"
    config.stage.labels.place = 5  # four quadrants, and the background
    config.steps = 2000
    config.optim.update({"peak_lr": 5e-4, "warmup_steps": 100})
    return config
