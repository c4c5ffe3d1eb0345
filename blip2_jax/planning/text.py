"""Plans as text."""

from collections.abc import Sequence

from blip2_jax.planning.chips import GIB
from blip2_jax.planning.estimate import Plan


def mesh_label(plan: Plan) -> str:
    """The mesh and what saves memory: "1x4x1, llm remat full"."""
    parts = ["x".join(map(str, plan["mesh"].values()))]
    parts += [
        f"{tower} remat {policy}" for tower, policy in plan["remat"].items() if policy != "none"
    ]
    if plan["accumulate"] > 1:
        parts.append(f"{plan['accumulate']} parts")
    return ", ".join(parts)


def ranking(plans: Sequence[Plan]) -> str:
    """One line a plan."""
    lines = [f"{'data x fsdp x tensor':<52} {'GiB':>7} {'samples/s':>10} {'MFU at most':>12}"]
    for plan in plans:
        if plan["fits"]:
            rate = plan["samples_per_second"]["expected"]
            numbers = f"{plan['memory']['peak'] / GIB:>7.2f} {rate:>10,.0f} "
            lines.append(f"{mesh_label(plan):<52} {numbers}{plan['mfu_ceiling']:>12.0%}")
        else:
            lines.append(f"{mesh_label(plan):<52} no: {plan['why_not']}")
    return "\n".join(lines)


def describe(plan: Plan) -> str:
    """A plan for people."""
    chips = f"{plan['chips']} {plan['chip']} chips"
    held = plan["parameters"]
    mesh = mesh_label(plan)
    lines = [
        f"{plan['recipe']} on {plan['topology']} ({chips}), data x fsdp x tensor = {mesh}",
        f"batch {plan['batch_size']:,}, {plan['samples']:,} samples in all",
        "",
        "Parameters and optimizer",
        f"  {held['total'] / GIB:.2f} GiB in all, {held['per_chip'] / GIB:.2f} a chip "
        f"({held['whole_on_every_chip'] / GIB:.2f} of them whole on every chip)",
    ]
    flops = plan["flops_per_sample"]
    by_tower = ", ".join(f"{k} {v / 1e9:,.4g}" for k, v in flops.items() if k != "all")
    lines.append(f"GFLOPs a sample, by hand: {flops['all'] / 1e9:,.4g} ({by_tower})")
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
