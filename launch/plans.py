"""Plans of many recipes: the tables of docs/planning.md.

  python launch/plans.py table                    every published recipe on three slices
  python launch/plans.py scaling                  what a chip sends, from 16 chips to 1024
  nice python launch/plans.py table --recipes='stage2.py*' --topologies=v5e-16

Full-size programs take minutes each to compile and up to 8 GB of memory, so they go one at a time;
what is in --workdir is kept, and the same command goes on. --show prints what there is.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from blip2_jax import cli
from blip2_jax.planning import topology
from blip2_jax.planning.candidates import candidates, nearest_batch
from blip2_jax.planning.chips import GIB
from blip2_jax.planning.compilation import prepare_process, versions
from blip2_jax.planning.estimate import make_plan
from blip2_jax.planning.text import mesh_label

RECIPES = (
    "stage1.py:vitg-paper",
    "stage2.py:vitg-opt2.7b-paper",
    "stage2.py:vitg-flant5xxl-paper",
    "finetune_caption.py:vitg-opt2.7b",
    "finetune_retrieval.py:vitg",
    "finetune_vqa.py:vitg-flant5xl",
    "instruct.py:vitg-vicuna7b",
    "stage2.py:vitg-flant5xl-paper",
    "stage2.py:vitg-opt6.7b-paper",
    "stage1.py:vitl-paper",
    "stage2.py:vitl-opt2.7b-paper",
    "stage2.py:vitl-flant5xl-paper",
    "stage1.py:vitg-lavis",
    "stage2.py:vitg-opt2.7b-lavis",
    "finetune_caption.py:vitg-flant5xl",
    "finetune_caption.py:vitg-opt6.7b",
    "finetune_vqa.py:vitg-opt2.7b",
    "finetune_vqa.py:vitg-opt6.7b",
    "finetune_retrieval.py:vitl",
    "instruct.py:vitg-flant5xl",
    "instruct.py:vitg-flant5xxl",
    "instruct.py:vitg-vicuna13b",
)
TOPOLOGIES = ("v5e-256", "v5p-128", "v6e-256")
SCALING = ("v6e-16", "v6e-64", "v6e-256", "4xv6e-256")
SCALED = ("stage1.py:vitg-paper", "stage2.py:vitg-opt2.7b-paper")
ROWS_PER_CHIP = 8
TRIES = 6  # ways to run a recipe that does not fit as it is


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("table", "scaling"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/plans"))
    parser.add_argument("--recipes", default="*", help="a pattern, e.g. 'stage2.py*'")
    parser.add_argument("--topologies", default="", help="instead of the table's, with commas")
    parser.add_argument("--show", action="store_true", help="only what there is; compile nothing")
    args = parser.parse_args()
    prepare_process()
    if args.what == "scaling":
        return scaling(args)
    names = [name for name in RECIPES if fnmatch.fnmatch(name, args.recipes)]
    if not names:
        parser.error(f"--recipes={args.recipes} names none of {', '.join(RECIPES)}.")
    topologies = args.topologies.split(",") if args.topologies else TOPOLOGIES
    slices = [topology.parse(name) for name in topologies]
    recipes = [(name, tpu_slice) for name in names for tpu_slice in slices]
    for name, tpu_slice in tqdm(recipes, desc="plans", unit="plan", disable=args.show):
        if not args.show:
            row(name, tpu_slice, args.workdir)
    print(table(recipes, args.workdir))
    return 0


def kept(name: str, tpu_slice: topology.Slice, workdir: Path) -> Path:
    return workdir / "table" / f"{name.replace('.py:', '-')}.{tpu_slice.name}.json"


def row(name: str, tpu_slice: topology.Slice, workdir: Path) -> None:
    """One recipe on one slice: as it is, or else the first way of a search that fits."""
    config = ConfigDict(cli.load_config(f"configs/{name}").to_dict())
    published = config.data.batch_size
    samples = config.steps * published
    config, _ = nearest_batch(config, tpu_slice)
    path = kept(name, tpu_slice, workdir)
    identity = {"config": config.to_dict(), "figures": dataclasses.asdict(tpu_slice.chip)}
    identity = json.loads(json.dumps({**identity, "versions": versions()}))
    if path.is_file() and identity.items() <= json.loads(path.read_text()).items():
        return
    made = make_plan(config, tpu_slice, workdir, samples=samples)
    own = {"own_mesh": mesh_label(made), "own_mesh_fits": made["fits"]}
    if not made["fits"] and not made["refused"]:
        ways = itertools.chain.from_iterable(candidates(config, tpu_slice))
        for other in itertools.islice(ways, TRIES):
            made = make_plan(other, tpu_slice, workdir, samples=samples)
            if made["fits"]:
                break
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"published_batch_size": published, **own, **identity}
    path.write_text(json.dumps({**made, **more}, indent=2) + "\n")


def table(recipes: list[tuple[str, topology.Slice]], workdir: Path) -> str:
    """A table in Markdown of the rows there are; a star where the recipe's own mesh is none."""
    lines = [
        "| recipe | slice | batch (published) | data x fsdp x tensor | GiB a chip (of) "
        "| samples/s expected (at most) | whole schedule |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    missing = 0
    for name, tpu_slice in recipes:
        path = kept(name, tpu_slice, workdir)
        if not path.is_file():
            missing += 1
            continue
        p = json.loads(path.read_text())
        batch = f"{p['batch_size']}"
        if p["batch_size"] != p["published_batch_size"]:
            batch += f" ({p['published_batch_size']})"
        start = f"| `{name}` | {tpu_slice.name} | {batch} | {mesh_label(p)}"
        star = "" if p["own_mesh_fits"] else " *"
        if not p["fits"]:
            reason = "does not compile" if p["refused"] else "does not fit"
            lines.append(f"{start} | {reason}: {p['why_not']} | | |")
            continue
        m, rate, days = p["memory"], p["samples_per_second"], p["days"]
        lines.append(
            f"{start}{star} | {m['peak'] / GIB:.1f} ({m['usable'] / GIB:.1f}) | "
            f"{rate['expected']:,.0f} ({rate['at_most']:,.0f}) | {duration(days['expected'])} |"
        )
    if missing:
        lines.append(f"\n{missing} of {len(recipes)} are not compiled yet.")
    return "\n".join(lines)


def duration(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} h"


def scaling(args: argparse.Namespace) -> int:
    """What a chip sends in a step, at the same rows a chip, on more and more chips.

    Parameters are split within 16 chips (`fsdp`), whatever the size of the slice; `data` grows.
    """
    topologies = args.topologies.split(",") if args.topologies else SCALING
    print(f"| {ROWS_PER_CHIP} rows a chip, MiB sent | " + " | ".join(topologies) + " | spread |")
    print("| --- |" + " ---: |" * (len(topologies) + 1))
    for name in SCALED:
        if not fnmatch.fnmatch(name, args.recipes):
            continue
        plans = []
        for tpu_slice in map(topology.parse, topologies):
            config = ConfigDict(cli.load_config(f"configs/{name}").to_dict())
            config.mesh.update({"data": tpu_slice.num_chips // 16, "fsdp": 16, "tensor": 1})
            config.data.batch_size = ROWS_PER_CHIP * tpu_slice.num_chips
            path = args.workdir / "scaling" / kept(name, tpu_slice, args.workdir).name
            if not path.is_file() and not args.show:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(make_plan(config, tpu_slice, args.workdir)))
            plans.append(json.loads(path.read_text()) if path.is_file() else None)
        print(scaling_rows(name, plans))
    return 0


def scaling_rows(name: str, plans: list[dict[str, Any] | None]) -> str:
    """All that is sent, then each kind by its axes."""
    kinds: dict[str, list[float]] = {name: []}
    for number, p in enumerate(plans):
        for c in p["collectives"] if p and p["fits"] else []:
            label = f"{c['kind']} on {'+'.join(c['axes'])}"
            for key in (name, label):
                sizes = kinds.setdefault(key, [])
                sizes += [0.0] * (number + 1 - len(sizes))
                sizes[number] += c["sent"] / 2**20
    lines = []
    for label, sizes in kinds.items():
        sizes += [0.0] * (len(plans) - len(sizes))
        known = [size for size, p in zip(sizes, plans, strict=True) if p]
        least = min(known, default=0.0)
        spread = f"{max(known) / least - 1:.0%}" if least else ""
        if label == name or max(sizes) > 1:
            cells = [f"{s:,.1f}" if p else "" for s, p in zip(sizes, plans, strict=True)]
            lines.append(f"| {label} | " + " | ".join(cells) + f" | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
