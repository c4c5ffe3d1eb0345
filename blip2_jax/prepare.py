"""Turn a data source into shards that training reads: ArrayRecord, with random access.

  blip2 prepare --source=digits --out=runs/quickstart/data

digits: the embedded world, scenes of real handwritten digits with captions and questions, drawn
here; the same seed and sizes give the same bytes. A folder that is finished is left as it is.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import time
from pathlib import Path

from blip2_jax import cli

DONE = "done.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, choices=["digits"], help="what to prepare")
    parser.add_argument("--out", required=True, help="folder to write; made if need be")
    parser.add_argument("--seed", type=int, default=0, help="of all scenes (default: 0)")
    parser.add_argument("--train", type=int, default=8000, help="training scenes (default: 8000)")
    parser.add_argument("--test", type=int, default=500, help="test scenes (default: 500)")
    parser.add_argument(
        "--held_out",
        type=int,
        default=200,
        help="test scenes with combinations that training never shows (default: 200)",
    )


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(__doc__, argv, add_arguments, config=False)
    sizes = {"train": args.train, "test": args.test, "held_out": args.held_out}
    small = [name for name, size in sizes.items() if size < 1]
    if small:
        raise SystemExit(f"blip2 prepare: --{small[0]} must be at least 1.")
    return prepare_digits(Path(args.out), args.seed, sizes)


def prepare_digits(out: Path, seed: int, sizes: dict[str, int]) -> int:
    """Writes the embedded world into `out`; returns the exit code."""
    settings = {"source": "digits", "seed": seed, "sizes": sizes}
    if (out / DONE).is_file():
        found = json.loads((out / DONE).read_text())
        if {name: found.get(name) for name in settings} != settings:
            raise SystemExit(
                f"blip2 prepare: {out} holds other data ({found}); name another --out."
            )
        print(f"{out}: prepared before.")
        return 0
    if out.is_dir() and any(out.iterdir()):
        raise SystemExit(f"blip2 prepare: {out} is not empty and not ours; name another --out.")

    import tensorflow_datasets as tfds  # only where there is something to do: it takes a while

    from blip2_jax.data.digits import DigitScenes

    tfds.disable_progress_bar()  # it shows three bars a split, none with an end; ours has one

    started = time.monotonic()
    # Built beside its final place and moved when whole: a kill leaves nothing half-made behind.
    draft = out.with_name(out.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    builder = DigitScenes(seed=seed, sizes=sizes, data_dir=draft)
    with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ...": there is nothing to
        builder.download_and_prepare()
    counts = {name: builder.info.splits[name].num_examples for name in sizes}
    seconds = time.monotonic() - started
    (draft / DONE).write_text(json.dumps({**settings, "seconds": seconds}, indent=2) + "\n")
    if out.is_dir():
        out.rmdir()
    os.replace(draft, out)
    written = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{out}: {written} scenes in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
