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
import json
import re
import sys
from pathlib import Path

from ml_collections import ConfigDict

from blip2_jax import cli
from blip2_jax.planning import topology
from blip2_jax.planning.candidates import nearest_batch
from blip2_jax.planning.compilation import prepare_process
from blip2_jax.planning.estimate import EFFICIENCY, Plan, make_plan
from blip2_jax.planning.search import search
from blip2_jax.planning.text import describe, mesh_label, ranking
from blip2_jax.runtime.outputs import Own


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
        tpu_slice = topology.parse(args.topology)
        config, workdir = ConfigDict(args.config.to_dict()), Path(args.workdir)
        cli.make_workdir(workdir)
        samples = config.steps * config.data.batch_size
        options = {"efficiency": args.efficiency, "samples": samples}
        if args.batch == "nearest":
            config, note = nearest_batch(config, tpu_slice)
            if note:
                print(note, file=sys.stderr)
        if args.mesh == "search":
            plans = search(config, tpu_slice, workdir, tries=args.tries, **options)
            print(ranking(plans) + "\n")
            best = plans[0]
        else:
            best = make_plan(config, tpu_slice, workdir, **options)
    except (ValueError, topology.NoCompiler) as error:
        print(f"blip2 plan: {error}", file=sys.stderr)
        return 2
    print(describe(best))
    print(f"\nWritten to {write(best, workdir)}")
    return 0 if best["fits"] else 1


def write(plan: Plan, workdir: Path) -> Path:
    """Keeps a plan as JSON; returns where."""
    label = re.sub(r"[^\w.]+", "-", mesh_label(plan))
    name = f"{plan['recipe']}.{plan['topology']}.b{plan['batch_size']}.{label}.json"
    with Own(workdir, "blip2 plan").replacing(name) as draft:
        draft.write_text(json.dumps(plan, indent=2) + "\n")
    return workdir / name


if __name__ == "__main__":
    raise SystemExit(main())
