"""Stage 2 in the embedded world: captions through the frozen language model."""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs.digits.common import get_config as common


def get_config() -> ConfigDict:
    config = common()
    config.name = "digits-stage2"
    config.stage.name = "stage2"
    config.trainable = ("ln_vision", "query_tokens", "qformer", "language_projection")
    config.init.checkpoint = "runs/quickstart/stage1"
    config.steps = 1200
    config.optim.update({"peak_lr": 1e-3, "end_lr": 5e-5, "warmup_steps": 100, "clip_norm": 1.0})
    config.eval.update({"every": 400, "batch_size": 100})
    return config


def sweep(add: Callable[..., None]) -> None:
    for seed in range(3):
        add(seed=seed)
