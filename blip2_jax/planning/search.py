"""The best mesh for a recipe on a slice, by compiling several."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from blip2_jax.planning import topology
from blip2_jax.planning.candidates import candidates, nearest_batch, quicker_variants
from blip2_jax.planning.estimate import Plan, make_plan


def search(
    config: ConfigDict, tpu_slice: topology.Slice, workdir: Path, *, tries: int, **options: Any
) -> list[Plan]:
    """Plans of several meshes, those that fit first, the fastest of them first.

    `options` are those of `make_plan`.

    What needs less memory is tried only while nothing fits; on the best mesh, what computes less
    again, too.

    Raises:
      ValueError: no mesh divides the batch.
    """
    by_mesh = list(candidates(config, tpu_slice))
    if not by_mesh:
        raise ValueError(
            f"No mesh of {tpu_slice.num_chips} chips divides config.data.batch_size "
            f"{config.data.batch_size}. {nearest_batch(config, tpu_slice)[1]} (--batch=nearest)"
        )
    tried: list[tuple[Plan, ConfigDict]] = []

    def speed(plan: Plan) -> float:
        return float(plan["samples_per_second"]["expected"]) if plan["fits"] else 0.0

    with tqdm(total=tries, desc="search", unit="program") as progress:

        def attempt(config: ConfigDict) -> Plan:
            tried.append((make_plan(config, tpu_slice, workdir, **options), config))
            progress.update()
            return tried[-1][0]

        # Skips variants that need more memory than the mesh before could give.
        first = 0
        for variants in by_mesh:
            while first < len(variants) and len(tried) < tries:
                plan = attempt(variants[first])
                if plan["fits"] or plan["refused"]:
                    break
                first += 1
            first = min(first, len(variants) - 1)
        best, config = max(tried, key=lambda pair: speed(pair[0]))
        for quicker in quicker_variants(config) if best["fits"] else ():
            if len(tried) >= tries or attempt(quicker)["fits"]:
                break
    return sorted((plan for plan, _ in tried), key=lambda plan: (not plan["fits"], -speed(plan)))
