"""A plan: what a compiled train step needs on a slice, and bounds of how fast it can be."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from blip2_jax import recipe
from blip2_jax.planning import hlo, topology
from blip2_jax.planning.candidates import TOWERS, nearest_batch, remedies, towers_of
from blip2_jax.planning.chips import CHIPS, Chip
from blip2_jax.planning.compilation import REFUSED, compile_step, versions
from blip2_jax.runtime import mesh as meshes
from blip2_jax.stages.flops import flops_per_sample

EFFICIENCY = 0.5  # share of the peak that matrix products reach in practice, as a rule

GPUS = ("h100", "h200", "b200")

Plan = dict[str, Any]


def make_plan(
    config: ConfigDict,
    tpu_slice: topology.Slice,
    workdir: Path,
    *,
    efficiency: float = EFFICIENCY,
    samples: int | None = None,
) -> Plan:
    """Compiles a recipe's step for a slice, and counts.

    Args:
      config: the recipe's.
      tpu_slice: the slice.
      workdir: where compiled programs are kept.
      efficiency: share of the peak that matrix products reach.
      samples: how many the whole schedule sees; None: the config's steps times its batch size.

    Raises:
      ValueError: what does not fit together, as `recipe.build` says.
      topology.NoCompiler: there is no libtpu.
    """
    devices = tpu_slice.devices()
    try:
        run = recipe.build(config, meshes.make_mesh(config.mesh, devices))
    except ValueError as error:
        if "does not divide" not in str(error):
            raise
        raise ValueError(
            f"{error} {nearest_batch(config, tpu_slice)[1]} (--batch=nearest)"
        ) from error
    compiled = compile_step(run, tpu_slice, workdir)
    towers = flops_per_sample(run.config, run.model_config)
    per_sample = sum(f.total for f in towers.values())
    plan: Plan = {
        "recipe": config.name,
        "topology": tpu_slice.name,
        "chip": tpu_slice.chip.name,
        "chips": tpu_slice.num_chips,
        "mesh": dict(run.mesh.shape),
        "batch_size": config.data.batch_size,
        "accumulate": config.stage.accumulate,
        "remat": {t: config.model[t].remat for t in TOWERS if t in towers_of(run)},
        "samples": samples or config.steps * config.data.batch_size,
        "fits": not compiled.error,
        "why_not": compiled.error,
        "refused": compiled.error.startswith(REFUSED),
        "parameters": parameter_bytes(run),
        "flops_per_sample": {"all": per_sample, **{k: f.total for k, f in towers.items()}},
        "compile_seconds": compiled.seconds,
        "versions": versions(),
    }
    if compiled.error:
        return plan | {"remedies": [] if plan["refused"] else remedies(run)}
    plan["memory"] = memory(compiled.memory, tpu_slice.chip)
    program = hlo.read(compiled.text, run.mesh.shape, tpu_slice.num_slices)
    plan["flops_per_chip"] = program.flops
    plan["collectives"] = [c._asdict() for c in hlo.by_kind(program.collectives)]
    return plan | estimate(plan, tpu_slice.chip, efficiency)


def parameter_bytes(run: recipe.Recipe) -> dict[str, float]:
    """Bytes of parameters and optimizer: in all, on a chip, and of those that a chip has whole."""
    total, local, whole = 0, 0, 0
    for leaf in jax.tree.leaves((run.abstract_state, run.abstract_frozen)):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        here = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total, local = total + size, local + here
        whole += size if here == size else 0
    return {"total": total, "per_chip": local, "whole_on_every_chip": whole}


def memory(stats: Mapping[str, int], chip: Chip) -> dict[str, int]:
    """Bytes on a chip while a step runs, from the compiler's figures."""
    peak = stats["argument"] + stats["temp"] + stats["generated_code"]
    peak += stats["output"] - stats["alias"]  # what is donated is written in its place
    return {
        "arguments": stats["argument"],
        "outputs": stats["output"],
        "donated": stats["alias"],
        "temporaries": stats["temp"],
        "code": stats["generated_code"],
        "peak": peak,
        "usable": chip.usable_bytes,
        "headroom": chip.usable_bytes - peak,
    }


def estimate(plan: Plan, chip: Chip, efficiency: float) -> Plan:
    """Lower bounds of a step's time, seconds, and what follows from them."""
    sent = {"links": 0.0, "network": 0.0}
    for c in plan["collectives"]:
        sent["network" if c["crosses_slices"] else "links"] += c["sent"]
    seconds = {
        "compute": plan["flops_per_chip"] / chip.peak_flops,
        "links": sent["links"] / chip.ici_bandwidth,
        "network": sent["network"] / chip.network_bandwidth,
        "memory": (plan["memory"]["arguments"] + plan["memory"]["outputs"]) / chip.memory_bandwidth,
    }
    fastest = max(seconds.values())
    expected = seconds["compute"] / efficiency + seconds["links"] + seconds["network"]
    expected = max(expected, fastest)
    per_step = plan["flops_per_sample"]["all"] * plan["batch_size"]
    rate = {"at_most": plan["batch_size"] / fastest, "expected": plan["batch_size"] / expected}
    return {
        "sent_per_chip": sent,
        "seconds_at_least": seconds,
        "efficiency": efficiency,
        "samples_per_second": rate,
        "days": {name: plan["samples"] / value / 86_400 for name, value in rate.items()},
        "mfu_ceiling": per_step / fastest / (plan["chips"] * chip.peak_flops),
        "gpus": {name: gpu_roofline(plan, CHIPS[name], sum(sent.values())) for name in GPUS},
    }


def gpu_roofline(plan: Plan, chip: Chip, sent: float) -> dict[str, float]:
    """The same counts on as many GPUs: nothing is compiled for them, these are bounds.

    Where there is more than one node, a ring goes through the network between them.
    """
    bandwidth = chip.link_bandwidth if plan["chips"] <= chip.node else chip.network_bandwidth
    seconds = max(plan["flops_per_chip"] / chip.peak_flops, sent / bandwidth)
    rate = plan["batch_size"] / seconds
    return {
        "memory_share": plan["memory"]["peak"] / chip.usable_bytes,
        "seconds_at_least": seconds,
        "samples_per_second_at_most": rate,
        "days_at_least": plan["samples"] / rate / 86_400,
    }
