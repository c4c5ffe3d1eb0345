"""Plan a run on TPUs that are not there: does it fit, what does it move, how long does it take.

    blip2 plan --config=configs/stage1.py --topology=v5p-128 --batch=nearest
    blip2 plan --config=configs/stage2.py:vitg-flant5xxl-paper --topology=v5e-16 --mesh=search
    blip2 plan --config=configs/stage1.py --topology=2xv6e-256 --config.mesh.data=2 --batch=nearest

The recipe's own train step, the one that blip2 train runs, is compiled for the slice by libtpu, on
any Linux machine, without a TPU and without weights (pip install 'blip2_jax[plan]'). Names of
slices are the cloud's: v5e-256 and v6e-64 count chips, v5p-128 and v4-128 TensorCores, two a chip.

    measured    by the compiler: memory, matrix products, collectives (a loop's as often as it runs)
    bounds      each of these over the chip's public peak: no run is faster than the slowest
    expected    an estimate: products at --efficiency of the peak, and nothing hidden behind them

--mesh=search tries meshes and, where memory is short, remat policies and smaller parts of a batch
(config.stage.accumulate), and ranks them. Compiled programs are kept in --workdir; the same command
again takes seconds. It receives a JSON file for each plan.
"""

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from blip2_jax import cli, recipe
from blip2_jax.runtime import atomic, hlo, slices
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.chips import CHIPS, GIB, Chip
from blip2_jax.runtime.outputs import Own
from blip2_jax.stages.flops import flops_per_sample

EFFICIENCY = 0.5  # share of the peak that matrix products reach in practice, as a rule
GPUS = ("h100", "h200", "b200")
TOWERS = ("vit", "qformer", "llm")

Plan = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `blip2 plan`."""
    parser.add_argument("--topology", required=True, help="the slice, e.g. v5e-16 or 2xv5e-256")
    parser.add_argument(
        "--mesh",
        choices=("recipe", "search"),
        default="recipe",
        help="the recipe's (default; --config.mesh.fsdp=... changes it), or the best that is found",
    )
    parser.add_argument("--tries", type=int, default=12, help="programs that a search may compile")
    parser.add_argument(
        "--batch",
        choices=("recipe", "nearest"),
        default="recipe",
        help="nearest: the batch size next to the recipe's that the slice divides",
    )
    parser.add_argument(
        "--efficiency", type=float, default=EFFICIENCY, help=f"see above (default: {EFFICIENCY})"
    )
    parser.add_argument(
        "--workdir", default="runs/plans", help="for the plans (default: %(default)s)"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs `blip2 plan`; returns its exit code."""
    args = cli.parse(__doc__, argv, add_arguments, prog="blip2 plan")
    prepare_process()
    try:
        if not 0 < args.efficiency <= 1:
            raise ValueError(f"--efficiency is {args.efficiency}; it is a share, above 0, up to 1.")
        if args.tries < 1:
            raise ValueError(f"--tries is {args.tries}; a search compiles at least one program.")
        where = slices.parse(args.topology)
        config, workdir = ConfigDict(args.config.to_dict()), Path(args.workdir)
        cli.make_workdir(workdir)
        samples = config.steps * config.data.batch_size
        options = {"efficiency": args.efficiency, "samples": samples}
        if args.batch == "nearest":
            config, note = nearest_batch(config, where)
            if note:
                print(note, file=sys.stderr)
        if args.mesh == "search":
            plans = search(config, where, workdir, tries=args.tries, **options)
            print(ranking(plans) + "\n")
            best = plans[0]
        else:
            best = make_plan(config, where, workdir, **options)
    except (ValueError, slices.NoCompiler) as error:
        print(f"blip2 plan: {error}", file=sys.stderr)
        return 2
    print(describe(best))
    print(f"\nWritten to {write(best, workdir)}")
    return 0 if best["fits"] else 1


def prepare_process() -> None:
    """Nothing here may touch a device: they are not there, or another program's."""
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger(meshes.__name__).setLevel(logging.ERROR)  # the plan says what is kept whole


# -------------------------------------------------------------------------------------- a plan


def make_plan(
    config: ConfigDict,
    where: slices.Slice,
    workdir: Path,
    *,
    efficiency: float = EFFICIENCY,
    samples: int | None = None,
) -> Plan:
    """Compiles a recipe's step for a slice, and counts.

    Args:
      config: the recipe's.
      where: the slice.
      workdir: where compiled programs are kept.
      efficiency: see the head of this file.
      samples: how many the whole schedule sees; None: the config's steps times its batch size.

    Raises:
      ValueError: what does not fit together, as `recipe.build` says.
      slices.NoCompiler: there is no libtpu.
    """
    devices = where.devices()
    try:
        run = recipe.build(config, meshes.make_mesh(config.mesh, devices))
    except ValueError as error:
        if "does not divide" not in str(error):
            raise
        raise ValueError(f"{error} {nearest_batch(config, where)[1]} (--batch=nearest)") from error
    compiled = compile_step(run, where, workdir)
    towers = flops_per_sample(run.config, run.model_config)
    per_sample = sum(f.total for f in towers.values())
    plan: Plan = {
        "recipe": config.name,
        "topology": where.name,
        "chip": where.chip.name,
        "chips": where.num_chips,
        "mesh": dict(run.mesh.shape),
        "batch_size": config.data.batch_size,
        "accumulate": config.stage.accumulate,
        "remat": {t: config.model[t].remat for t in TOWERS if t in _towers(run)},
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
    plan["memory"] = memory(compiled.memory, where.chip)
    program = hlo.read(compiled.text, run.mesh.shape, where.num_slices)
    plan["flops_per_chip"] = program.flops
    plan["collectives"] = [c._asdict() for c in hlo.by_kind(program.collectives)]
    return plan | estimate(plan, where.chip, efficiency)


def _towers(run: recipe.Recipe) -> set[str]:
    return run.abstract_state["params"].keys() | run.abstract_frozen.keys()


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


# ------------------------------------------------------------------------------------ compiling


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said: bytes by kind and the program's text, or why it does not fit."""

    memory: dict[str, int]
    text: str
    error: str
    seconds: float


def compile_step(run: recipe.Recipe, where: slices.Slice, workdir: Path) -> Compiled:
    """The recipe's train step, compiled for a slice; a program that was compiled before is read."""
    lowered = run.lower_step()
    label = f"{where.name}\n{versions()}\n{lowered.as_text()}"
    key = hashlib.sha256(label.encode()).hexdigest()[:24]
    kept = workdir / "compiled" / f"{key}.json"
    text = kept.with_suffix(".hlo.gz")
    with contextlib.suppress(OSError, EOFError, ValueError, LookupError):  # none, or damaged
        said = json.loads(kept.read_text())
        if not said["error"]:
            said["text"] = gzip.decompress(text.read_bytes()).decode()
        return Compiled(**said)
    print(f"Compiling {run.config.name} for {where.name} (minutes) ...", file=sys.stderr)
    started = time.monotonic()
    said = {"memory": {}, "text": "", "error": ""}
    try:
        program = lowered.compile()
        stats = program.memory_analysis()
        kinds = ("argument", "output", "alias", "temp", "generated_code")
        said["memory"] = {kind: getattr(stats, f"{kind}_size_in_bytes") for kind in kinds}
        said["text"] = program.as_text()
    except jax.errors.JaxRuntimeError as error:
        said["error"] = why_it_does_not_run(str(error))
    said["seconds"] = time.monotonic() - started
    atomic.write_bytes(text, gzip.compress(said["text"].encode(), 5))
    atomic.write_json(kept, {**said, "text": ""}, indent=None)
    return Compiled(**said)


def versions() -> dict[str, str]:
    """Of what a plan depends on; "" of what is not installed."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


REFUSED = "The compiler refuses the program: "


def why_it_does_not_run(message: str) -> str:
    """The compiler's words, in one line: too little memory, or something it cannot do there."""
    if "RESOURCE_EXHAUSTED" not in message:
        first = message.splitlines()[0]
        return REFUSED + re.sub(r"^INTERNAL: RET_CHECK failure \(\S+\) \S+ ", "", first)
    forms = {
        "Temporaries alone need": r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)",
        "It needs": r"Used ([\d.]+)G of ([\d.]+)G hbm",
    }
    for what, form in forms.items():
        if found := re.search(form, message):
            needed, usable = map(float, found.groups())
            return (
                f"{what} {needed:.2f} GiB a chip, {usable:.2f} are usable: "
                f"{needed - usable:.2f} GiB too many."
            )
    return message.splitlines()[0]


def remedies(run: recipe.Recipe) -> list[str]:
    """What to try, the cheapest first."""
    rows = run.config.data.batch_size // meshes.num_batch_shards(run.mesh)
    tries = []
    for leaner in _leaner(run.config, rows):
        if leaner.stage.accumulate != run.config.stage.accumulate:
            tries.append(f"--config.stage.accumulate={leaner.stage.accumulate}")
        else:
            tries.append(f"--config.model.qformer.remat={leaner.model.qformer.remat}")
    for tower in ("vit", "llm"):
        if tower in _towers(run) and run.config.model[tower].remat == "none":
            if tower == "llm" or tower in run.abstract_state["params"]:
                tries.append(f"--config.model.{tower}.remat=full")
    return [*tries[:3], "--mesh=search", "a larger slice, or a smaller batch"]


# ------------------------------------------------------------------------- batches and meshes


def nearest_batch(config: ConfigDict, where: slices.Slice) -> tuple[ConfigDict, str]:
    """The recipe with the batch size next to its own that the slice's mesh divides.

    Returns:
      The config with another batch size, and a line that says so and what else a run should set
      ("" where nothing is changed). The peak learning rate goes with the root of the batch size,
      the rule for Adam (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient
      Algorithms"); steps are as many as see the same number of samples.
    """
    before = config.data.batch_size
    sizes = meshes.mesh_sizes(config.mesh, where.num_chips)
    unit = math.prod(sizes[: len(meshes.BATCH_AXES)]) * config.stage.accumulate
    after = max(unit, round(before / unit) * unit)
    if after == before:
        return config, ""
    config = ConfigDict(config.to_dict())
    config.data.batch_size = after
    rate = config.optim.peak_lr * math.sqrt(after / before)
    steps = round(config.steps * before / after)
    return config, (
        f"The nearest batch size is {after} (the recipe's is {before}): "
        f"--config.data.batch_size={after} --config.optim.peak_lr={rate:.4g} "
        f"--config.steps={steps}; the rate goes with the root of the batch size."
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def candidates(config: ConfigDict, where: slices.Slice) -> Iterator[list[ConfigDict]]:
    """For each sensible mesh, the ways to run on it: the recipe's own, then those of less memory.

    `fsdp` goes from all chips of a slice down (parameters whole in more places, fewer bytes to
    gather), `tensor` splits what a single chip's rows cannot.
    """
    chips = where.num_chips // where.num_slices
    shapes = [
        (where.num_slices * chips // (fsdp * tensor), fsdp, tensor)
        for tensor in (1, 2, 4)
        for fsdp in (n for n in reversed(_divisors(chips // tensor)) if 16 * n >= chips)
        if chips % (fsdp * tensor) == 0
    ]
    for data, fsdp, tensor in sorted(shapes, key=lambda s: (s[2], -s[1])):
        rows, rest = divmod(config.data.batch_size, data * fsdp)
        if rest or not rows:
            continue
        base = ConfigDict(config.to_dict())
        base.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
        yield [base, *_leaner(base, rows)]


def _leaner(config: ConfigDict, rows: int) -> Iterator[ConfigDict]:
    """The same with less and less memory: stage 2 in parts, stage 1 with more computed again."""
    leaner = ConfigDict(config.to_dict())
    if config.stage.name == "stage2":
        for parts in _divisors(rows):
            if parts > config.stage.accumulate:
                leaner.stage.accumulate = parts
                yield ConfigDict(leaner.to_dict())
    elif config.model.qformer.remat == "none":
        for policy in ("dots", "full"):
            leaner.model.qformer.remat = policy
            yield ConfigDict(leaner.to_dict())


def search(
    config: ConfigDict, where: slices.Slice, workdir: Path, *, tries: int, **options: Any
) -> list[Plan]:
    """Plans of several meshes, those that fit first, the fastest of them first.

    `options` are those of `make_plan`.

    What needs less memory is tried only while nothing fits; on the best mesh, what computes less
    again, too.

    Raises:
      ValueError: no mesh divides the batch.
    """
    ladders = list(candidates(config, where))
    if not ladders:
        raise ValueError(
            f"No mesh of {where.num_chips} chips divides config.data.batch_size "
            f"{config.data.batch_size}. {nearest_batch(config, where)[1]} (--batch=nearest)"
        )
    tried: list[tuple[Plan, ConfigDict]] = []
    speed = lambda plan: plan["samples_per_second"]["expected"] if plan["fits"] else 0.0  # noqa: E731
    with tqdm(total=tries, desc="search", unit="program") as progress:

        def attempt(config: ConfigDict) -> Plan:
            tried.append((make_plan(config, where, workdir, **options), config))
            progress.update()
            return tried[-1][0]

        rung = (
            0  # of the ladder, on which the mesh before fitted; this one will hardly do with less
        )
        for ladder in ladders:
            while rung < len(ladder) and len(tried) < tries:
                found = attempt(ladder[rung])
                if found["fits"] or found["refused"]:
                    break
                rung += 1
            rung = min(rung, len(ladder) - 1)
        best, config = max(tried, key=lambda pair: speed(pair[0]))
        for quicker in _quicker(config) if best["fits"] else ():
            if len(tried) >= tries or attempt(quicker)["fits"]:
                break
    return sorted((plan for plan, _ in tried), key=lambda plan: (not plan["fits"], -speed(plan)))


def _quicker(config: ConfigDict) -> Iterator[ConfigDict]:
    """The same with less computed again, if memory allows."""
    towers = [tower for tower in TOWERS if config.model[tower].remat == "full"]
    for policy in ("none", "dots") if towers else ():
        quicker = ConfigDict(config.to_dict())
        for tower in towers:
            quicker.model[tower].remat = policy
        yield quicker


# --------------------------------------------------------------------------------------- words


def way(plan: Plan) -> str:
    """The mesh and what saves memory, in a few words."""
    words = ["x".join(map(str, plan["mesh"].values()))]
    words += [
        f"{tower} remat {policy}" for tower, policy in plan["remat"].items() if policy != "none"
    ]
    if plan["accumulate"] > 1:
        words.append(f"{plan['accumulate']} parts")
    return ", ".join(words)


def ranking(plans: Sequence[Plan]) -> str:
    """One line a plan."""
    lines = [f"{'data x fsdp x tensor':<52} {'GiB':>7} {'samples/s':>10} {'MFU at most':>12}"]
    for plan in plans:
        if plan["fits"]:
            rate = plan["samples_per_second"]["expected"]
            numbers = f"{plan['memory']['peak'] / GIB:>7.2f} {rate:>10,.0f} "
            lines.append(f"{way(plan):<52} {numbers}{plan['mfu_ceiling']:>12.0%}")
        else:
            lines.append(f"{way(plan):<52} no: {plan['why_not']}")
    return "\n".join(lines)


def describe(plan: Plan) -> str:
    """A plan for people."""
    chips = f"{plan['chips']} {plan['chip']} chips"
    held = plan["parameters"]
    lines = [
        f"{plan['recipe']} on {plan['topology']} ({chips}), data x fsdp x tensor = {way(plan)}",
        f"batch {plan['batch_size']:,}, {plan['samples']:,} samples in all",
        "",
        "Parameters and optimizer",
        f"  {held['total'] / GIB:.2f} GiB in all, {held['per_chip'] / GIB:.2f} a chip "
        f"({held['whole_on_every_chip'] / GIB:.2f} of them whole on every chip)",
    ]
    flops = plan["flops_per_sample"]
    parts = ", ".join(f"{k} {v / 1e9:,.4g}" for k, v in flops.items() if k != "all")
    lines.append(f"GFLOPs a sample, by hand: {flops['all'] / 1e9:,.4g} ({parts})")
    if not plan["fits"]:
        if plan["refused"]:
            return "\n".join([*lines, "", f"DOES NOT COMPILE. {plan['why_not']}"])
        lines += ["", f"DOES NOT FIT. {plan['why_not']}", "What may help:"]
        return "\n".join(lines + [f"  {remedy}" for remedy in plan["remedies"]])
    m, seconds, rate = plan["memory"], plan["seconds_at_least"], plan["samples_per_second"]
    per_step = plan["flops_per_chip"] * plan["chips"]
    lines += [
        "",
        "Measured by the compiler",
        f"  memory a chip    {m['peak'] / GIB:.2f} GiB of {m['usable'] / GIB:.2f}: arguments "
        f"{m['arguments'] / GIB:.2f}, temporaries {m['temporaries'] / GIB:.2f}; "
        f"{m['headroom'] / GIB:.2f} to spare; {m['donated'] / GIB:.2f} donated",
        f"  products a step  {per_step / 1e12:,.4g} TFLOPs; "
        f"{per_step / plan['batch_size'] / 1e9:,.4g} GFLOPs a sample, what is done twice included",
        "  a chip sends in a step",
    ]
    for c in plan["collectives"]:
        if c["sent"] > 1e3:
            far = ", between slices" if c["crosses_slices"] else ""
            axes = "+".join(c["axes"])
            lines.append(
                f"    {c['kind']:<20} {axes:<12} {c['sent'] / 2**20:>10,.1f} MiB in {c['times']:,}"
                f"{far}"
            )
    bounds = ", ".join(f"{name} {value * 1e3:,.1f}" for name, value in seconds.items())
    lines += [
        "",
        f"Bounds from public peaks, ms a step at least: {bounds}",
        f"  at most   {rate['at_most']:>8,.0f} samples/s, MFU {plan['mfu_ceiling']:.0%}; the whole "
        f"schedule takes at least {plan['days']['at_most']:.2f} days",
        f"Estimate (products at {plan['efficiency']:.0%} of the peak, nothing hidden)",
        f"  expected  {rate['expected']:>8,.0f} samples/s, {plan['days']['expected']:.2f} days",
        "",
        f"The same counts on {plan['chips']} GPUs, on this mesh; bounds, nothing is compiled",
    ]
    for name, g in plan["gpus"].items():
        lines.append(
            f"  {name:<8} {g['samples_per_second_at_most']:>8,.0f} samples/s at most, "
            f"{g['days_at_least']:.2f} days at least, memory {g['memory_share']:.0%}"
        )
    return "\n".join(lines)


def write(plan: Plan, workdir: Path) -> Path:
    """Keeps a plan as JSON; returns where."""
    how = re.sub(r"[^\w.]+", "-", way(plan))
    name = f"{plan['recipe']}.{plan['topology']}.b{plan['batch_size']}.{how}.json"
    with Own(workdir, "blip2 plan").replacing(name) as draft:
        draft.write_text(json.dumps(plan, indent=2) + "\n")
    return workdir / name


if __name__ == "__main__":
    raise SystemExit(main())
