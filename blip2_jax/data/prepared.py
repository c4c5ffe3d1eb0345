"""The note that `blip2 prepare` leaves in a folder of data that is complete."""

import json
from typing import Any

from blip2_jax.data import files
from blip2_jax.data.faults import RecordError

PREPARED = "prepared.json"


def read_json(folder: str, name: str) -> dict[str, Any]:
    """A note of `blip2 prepare`; {} where there is none.

    Raises:
      ValueError: it is damaged.
    """
    path = files.join(folder, name)
    try:
        return dict(json.loads(files.read(path)))
    except RecordError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove the folder and prepare it again, or name another "
            "--out."
        ) from error
