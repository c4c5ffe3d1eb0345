"""Stage 2 of the two claims in small, after `claims_stage1.py`; the conditions are in `claims.py`.

```bash
blip2 sweep --config=configs/digits/claims_stage2.py --workdir=runs/claims/stage2 --backend=local
```
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs.digits import claims
from configs.digits.stage2 import get_config as stage2


def get_config() -> ConfigDict:
    config = claims.under(stage2(), "vqa", every=25)
    config.name = "claims-stage2"
    config.steps = 150
    config.optim.warmup_steps = 50
    return config


def sweep(add: Callable[..., None]) -> None:
    for seed in claims.SEEDS:
        add(**{"seed": seed, "init.checkpoint": ""})
        for way in claims.WAYS:
            add(**{"seed": seed, "init.checkpoint": claims.stage1_folder(way, seed)})
