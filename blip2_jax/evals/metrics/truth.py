"""Whether captions are true, for data sets whose records say all that an image shows."""

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

# By the field of a record that holds the truth: what reads the field, and what says whether a
# caption is true of the result. Looked up by name, so that nothing here imports a data set.
CHECKS = {
    "scene": ("blip2_jax.digits.world:scene_from_json", "blip2_jax.digits.world:facts_correct")
}


def truth_check(record: Mapping[str, Any]) -> Callable[[str], bool] | None:
    """What says whether every claim of a caption holds for a record; None if that is not known."""
    for field, names in CHECKS.items():
        if field in record:
            parse, is_correct = map(pkgutil.resolve_name, names)
            truth = parse(record[field])
            return lambda caption: bool(is_correct(caption, truth))
    return None
