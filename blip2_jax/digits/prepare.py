"""`blip2 prepare --source=digits`: the embedded world, written to disk."""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path

from blip2_jax.data.prepared import PREPARED, read_json
from blip2_jax.runtime.outputs import replacing_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this source."""
    group = parser.add_argument_group("the embedded world (digits)")
    group.add_argument("--seed", type=int, default=0, help="of all scenes (default: 0)")
    group.add_argument("--train", type=int, default=8000, help="training scenes (default: 8000)")
    group.add_argument("--test", type=int, default=500, help="test scenes (default: 500)")
    group.add_argument(
        "--held_out",
        type=int,
        default=200,
        help="test scenes with combinations that training never shows (default: 200)",
    )


def prepare(args: argparse.Namespace) -> int:
    """Writes what the flags ask for; returns the exit code."""
    sizes = {"train": args.train, "test": args.test, "held_out": args.held_out}
    small = [name for name, size in sizes.items() if size < 1]
    if small:
        raise SystemExit(f"blip2 prepare: --{small[0]} must be at least 1.")
    return write(Path(args.out), args.seed, sizes)


def write(out: Path, seed: int, sizes: dict[str, int]) -> int:
    """Writes the embedded world into `out`; returns the exit code."""
    settings = {"source": "digits", "seed": seed, "sizes": sizes}
    if (out / PREPARED).is_file():
        done = read_json(str(out), PREPARED)
        if {name: done.get(name) for name in settings} != settings:
            raise SystemExit(f"blip2 prepare: {out} holds other data ({done}); name another --out.")
        print(f"{out}: prepared before.")
        return 0
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"blip2 prepare: {out} is not empty and not ours; name another --out.")

    import tensorflow_datasets as tfds  # only where there is something to do: it takes a while

    from blip2_jax.digits.dataset import DigitScenes

    tfds.disable_progress_bar()  # it shows three bars a split, none with an end; ours has one

    started = time.monotonic()
    # Built beside its final place and moved when whole: a kill leaves nothing half-made behind.
    with replacing_folder(out) as draft:
        builder = DigitScenes(seed=seed, sizes=sizes, data_dir=draft)
        with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ...": there is nothing to
            builder.download_and_prepare()
        counts = {name: builder.info.splits[name].num_examples for name in sizes}
        seconds = time.monotonic() - started
        (draft / PREPARED).write_text(json.dumps({**settings, "seconds": seconds}, indent=2) + "\n")
    written = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{out}: {written} scenes in {seconds:.0f} s")
    return 0
