"""What a run prints at its start: parameters, memory, FLOPs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from clu import parameter_overview
from ml_collections import ConfigDict
from tqdm import tqdm

from blip2_jax import recipe
from blip2_jax.runtime import mesh


@dataclasses.dataclass(frozen=True)
class _Part:
    """A row of the table of a run's parts."""

    part: str
    kind: str
    parameters: str
    per_device: str
    fingerprint: str


def describe(run: recipe.Recipe, fingerprints: dict[str, str], flops: float) -> str:
    """The tables that a run starts with.

    The first has every array that is trained, with its sharding; the second every part, and what a
    device holds of it.
    """
    config = run.config
    arrays = parameter_overview.get_parameter_overview(
        run.abstract_state["params"], include_stats="sharding"
    )
    return "\n".join(
        [
            f"{config.name}: {config.steps} steps of {config.data.batch_size} on {run.mesh.size} "
            f"{jax.devices()[0].device_kind} device(s), mesh {dict(run.mesh.shape)}",
            "Trained parameters:",
            arrays.rpartition("\nTotal:")[0],  # counts are in the next table
            parameter_overview.make_table(list(_parts(run, fingerprints))),
            *texts_of(config),
            f"  {_size(flops, 'FLOPs')} an example",
        ]
    )


def _parts(run: recipe.Recipe, fingerprints: dict[str, str]) -> Iterator[_Part]:
    for part, tree in run.abstract_state["params"].items():
        yield _Part(part, "trained", _count(tree), _held(tree), "")
    for part, tree in run.abstract_frozen.items():
        yield _Part(part, "frozen", _count(tree), _held(tree), fingerprints[part][:16])
    yield _Part("optimizer", "", "", _held(run.abstract_state["opt_state"]), "")


def _count(tree: Any) -> str:
    # A part may be a single array; clu counts a scalar as 1.0.
    return f"{int(parameter_overview.count_parameters({'part': tree})):,}"


def _held(tree: Any) -> str:
    return _size(mesh.bytes_per_device(tree))


def texts_of(config: ConfigDict) -> list[str]:
    """How texts are made of records, with white space made visible."""
    if config.stage.name != "stage2":
        return []
    return [f"  prompt {config.data.prompt!r}, end of text {config.data.end_of_text!r}"]


def describe_memory(train_step: jax.stages.Compiled) -> str:
    """What the compiler says that the step needs on a device, beside what the device has."""
    stats = train_step.memory_analysis()
    if stats is None:
        return "  memory: this backend's compiler does not say"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    has = f", which has {_size(limit)}" if limit else ""
    return (
        f"  a step needs {_size(stats.argument_size_in_bytes)} for what it is given and "
        f"{_size(stats.temp_size_in_bytes)} to work in, on each device{has}"
    )


def _size(number: float, unit: str = "B") -> str:
    """1.23 GB for 1.23e9."""
    text = tqdm.format_sizeof(number, unit)
    return text.replace(text.lstrip("0123456789."), " " + text.lstrip("0123456789."))
