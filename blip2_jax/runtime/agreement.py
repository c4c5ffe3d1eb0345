"""A check, before a run's first step, that all its processes are about to do the same.

Processes that differ in a flag, in their code or in a file would train on: each computes its part
of another model, and nothing in the log shows it.
"""

import contextlib
import hashlib
import itertools
import json
import platform
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import blip2_jax
from blip2_jax.runtime import distributed
from blip2_jax.runtime.compare import PLACES, differences
from blip2_jax.runtime.mesh import flatten_with_names
from blip2_jax.runtime.watchdog import waiting_for_others

# What batches, initialization and programs depend on.
LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers",
    "tokenizers", "tensorflow-datasets", "pillow",
)  # fmt: skip
JAX_OPTIONS = (
    "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_default_matmul_precision",
)  # fmt: skip
# Execution of each process, and paths whose contents are compared by digest: these may differ.
LOCAL = PLACES | {
    "config.distributed", "config.data.threads", "config.data.workers", "config.data.index_dir",
    "config.evals.*.data.index_dir",
}  # fmt: skip
MAX_LINES = 20  # that are shown of what differs

_meetings = itertools.count()  # all processes meet equally often


class ProcessesDiffer(ValueError):
    """The processes of a run are not about to do the same; the message says which, and how."""


@contextlib.contextmanager
def together(what: str) -> Iterator[dict[str, Any]]:
    """Work that each process does alone, and whose results must be the same on all.

    The block puts what must be the same into the dict that it is given, as JSON holds it. If it
    fails on some processes, all others stop too, instead of waiting for those.

    Args:
      what: the work, for messages: "cannot WHAT".

    Raises:
      ProcessesDiffer: on every process, if results differ; on the others, if some have failed.
    """
    facts: dict[str, Any] = {}
    try:
        yield facts
    except Exception as error:
        _compare({"failed": f"{type(error).__name__}: {error}"}, what)
        raise
    _compare(facts, what)


def _compare(facts: Mapping[str, Any], what: str) -> None:
    if distributed.process_count() == 1:
        return
    facts = json.loads(json.dumps(facts))
    with waiting_for_others():
        distributed.wait_for_all(f"blip2_jax {next(_meetings)}")
        digests = distributed.gather(_digest(facts))
    if len(set(digests)) == 1:
        return
    hosts = distributed.gather({"name": socket.gethostname(), "facts": facts})
    if "failed" in facts:
        return  # this process says itself what is wrong
    failed = {
        i: host["facts"]["failed"] for i, host in enumerate(hosts) if "failed" in host["facts"]
    }
    if failed:
        raise ProcessesDiffer(
            "\n".join(
                f"Process {i} ({hosts[i]['name']}) cannot {what}: {error}"
                for i, error in failed.items()
            )
        )
    usual, _ = Counter(digests).most_common(1)[0]  # of as many, the first
    lines = []
    for i, host in enumerate(hosts):
        if digests[i] != usual:
            expected = hosts[digests.index(usual)]["facts"]
            different = [
                line
                for name in expected.keys() | host["facts"].keys()
                for line in differences(
                    name, expected.get(name), host["facts"].get(name), LOCAL, ("elsewhere", "here")
                )
            ]
            lines += [f"Process {i} ({host['name']}):", *sorted(different)[:MAX_LINES]]
            if len(different) > MAX_LINES:
                lines.append(f"  ... and {len(different) - MAX_LINES} more")
    raise ProcessesDiffer(
        f"{digests.count(usual)} of {len(hosts)} processes are about to do the same, the others "
        "something else. Give all the same command, code, libraries and files.\n" + "\n".join(lines)
    )


def _digest(facts: Mapping[str, Any]) -> str:
    """Of what must be the same; the order of keys, and what is `LOCAL`, do not matter."""

    def kept(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        names = {key: f"{name}.{key}" if name else key for key in value}
        free = {key for key in value if any(fnmatchcase(names[key], pattern) for pattern in LOCAL)}
        return {key: kept(names[key], value[key]) for key in value if key not in free}

    text = json.dumps(kept("", facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def program() -> dict[str, Any]:
    """What this process runs: versions, JAX's options, and a digest of this package's files."""
    package = hashlib.sha256()
    folder = Path(blip2_jax.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            package.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
        "jax_options": {name: str(getattr(jax.config, name)) for name in JAX_OPTIONS},
        "blip2_jax": package.hexdigest()[:16],
    }


def layout(tree: Any) -> dict[str, str]:
    """Path -> shape, dtype and partition of each leaf of a tree with shardings."""
    return {
        path: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)} {leaf.sharding.spec}"
        for path, leaf in flatten_with_names(tree)
    }
