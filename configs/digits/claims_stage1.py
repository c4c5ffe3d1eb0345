"""Stage 1 of the two claims in small; the conditions are in `claims.py`.

```bash
blip2 sweep --config=configs/digits/claims_stage1.py --workdir=runs/claims/stage1 --backend=local
```
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs.digits import claims
from configs.digits.stage1 import get_config as stage1


def get_config() -> ConfigDict:
    config = claims.under(stage1(), "retrieval", every=300)
    config.name = "claims-stage1"
    return config


def sweep(add: Callable[..., None]) -> None:
    for seed in claims.SEEDS:
        for way in claims.WAYS:
            add(**claims.stage1_point(way, seed))
