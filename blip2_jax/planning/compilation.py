"""A recipe's train step, compiled for a slice by libtpu; compiled programs are kept on disk."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import logging
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from blip2_jax import recipe
from blip2_jax.planning import topology
from blip2_jax.runtime import atomic
from blip2_jax.runtime import mesh as meshes

REFUSED = "The compiler refuses the program: "


def prepare_process() -> None:
    """Keeps this process off the devices, which another program may use."""
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger(meshes.__name__).setLevel(logging.ERROR)  # the plan says what is kept whole


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's result: bytes by kind and the program's text, or why it does not fit."""

    memory: dict[str, int]
    text: str
    error: str
    seconds: float


def compile_step(run: recipe.Recipe, tpu_slice: topology.Slice, workdir: Path) -> Compiled:
    """The recipe's train step, compiled for a slice; a program that was compiled before is read."""
    lowered = run.lower_step()
    label = f"{tpu_slice.name}\n{versions()}\n{lowered.as_text()}"
    key = hashlib.sha256(label.encode()).hexdigest()[:24]
    kept = workdir / "compiled" / f"{key}.json"
    text = kept.with_suffix(".hlo.gz")
    with contextlib.suppress(OSError, EOFError, ValueError, LookupError):  # none, or damaged
        record = json.loads(kept.read_text())
        if not record["error"]:
            record["text"] = gzip.decompress(text.read_bytes()).decode()
        return Compiled(**record)
    print(f"Compiling {run.config.name} for {tpu_slice.name} (minutes) ...", file=sys.stderr)
    started = time.monotonic()
    record = {"memory": {}, "text": "", "error": ""}
    try:
        program = lowered.compile()
        stats = program.memory_analysis()
        kinds = ("argument", "output", "alias", "temp", "generated_code")
        record["memory"] = {kind: getattr(stats, f"{kind}_size_in_bytes") for kind in kinds}
        record["text"] = program.as_text()
    except jax.errors.JaxRuntimeError as error:
        record["error"] = why_it_does_not_run(str(error))
    record["seconds"] = time.monotonic() - started
    atomic.write_bytes(text, gzip.compress(record["text"].encode(), 5))
    atomic.write_json(kept, {**record, "text": ""}, indent=None)
    return Compiled(**record)


def versions() -> dict[str, str]:
    """Of what a plan depends on; "" of what is not installed."""
    installed = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = ""
    return installed


def why_it_does_not_run(message: str) -> str:
    """The compiler's message in one line: too little memory, or something it cannot do there."""
    if "RESOURCE_EXHAUSTED" not in message:
        first = message.splitlines()[0]
        return REFUSED + re.sub(r"^INTERNAL: RET_CHECK failure \(\S+\) \S+ ", "", first)
    forms = {
        "Temporaries alone need": r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)",
        "It needs": r"Used ([\d.]+)G of ([\d.]+)G hbm",
    }
    for subject, form in forms.items():
        if match := re.search(form, message):
            needed, usable = map(float, match.groups())
            return (
                f"{subject} {needed:.2f} GiB a chip, {usable:.2f} are usable: "
                f"{needed - usable:.2f} GiB too many."
            )
    return message.splitlines()[0]
