"""Stage 1 in the embedded world: ITC + ITM + ITG against the frozen encoder."""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs.digits.common import get_config as common


def get_config() -> ConfigDict:
    config = common()
    config.name = "digits-stage1"
    config.steps = 1200
    config.optim.update({"peak_lr": 1e-3, "end_lr": 1e-5, "warmup_steps": 100, "clip_norm": 1.0})
    config.eval.update({"every": 400, "batch_size": 100})
    return config


def sweep(add: Callable[..., None]) -> None:
    for seed in range(3):
        add(seed=seed)
