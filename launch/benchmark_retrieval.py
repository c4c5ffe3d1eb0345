"""Measures image-text retrieval with re-ranking: time and memory as images and texts grow.

  python launch/benchmark_retrieval.py --folder=/tmp/retrieval --model=runs/quickstart/stage1
  python launch/benchmark_retrieval.py --folder=/tmp/retrieval      an untrained model of that size
  python launch/benchmark_retrieval.py --folder=DIR --images 100 500

Draws scenes of the embedded world, five captions each, and runs `blip2 evaluate` on the first 250
and on 1,000 of them (or as --images says), each in a process of its own: every image against every
text by ITC, then the best 128 of each image and each text by ITM. Memory is the process's peak,
beside that of the same command on 50 images (libraries, the model, compiled programs); pairs are
those that ITM read.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = (50, 250, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="for the data and the results")
    parser.add_argument("--model", help="a finished stage-1 run of the embedded world")
    parser.add_argument("--images", type=int, nargs="+", default=SIZES, help="how many, in turn")
    args = parser.parse_args()
    folder = Path(args.folder)
    data = folder / "data"
    sizes = [
        f"--train={64 if args.model is None else 1}",
        f"--test={max(args.images)}",
        "--held_out=1",
    ]
    blip2("prepare", "--source=digits", f"--out={data}", *sizes)
    model = args.model
    if model is None:
        model = str(folder / "untrained")
        changes = ["--config.steps=1", "--config.eval.every=0", f"--config.data.dir={data}"]
        blip2("train", "--config=configs/digits/stage1.py", f"--workdir={model}", *changes)
    print(f"{'images':>8}{'texts':>8}{'pairs':>10}{'seconds':>9}{'pairs/s':>9}{'peak GB':>9}")
    for images in args.images:
        workdir = folder / f"{images}"
        shutil.rmtree(workdir, ignore_errors=True)
        keys = {"rerank": 128, "captions": 0, "group": 0, "data.first": images, "data.dir": data}
        started = time.monotonic()
        memory = blip2(
            "evaluate",
            "--config=configs/digits/evaluate.py",
            f"--workdir={workdir}",
            "--task=retrieval",
            f"--model={model}",
            *(f"--config.tasks.retrieval.{key}={value}" for key, value in keys.items()),
        )
        seconds = time.monotonic() - started
        metrics = json.loads((workdir / "metrics.json").read_text())
        predictions = (workdir / "predictions" / "retrieval.0.jsonl").read_text().splitlines()
        pairs = sum(len(json.loads(line)["texts"]) for line in predictions[1:])
        texts = metrics["retrieval/candidate_texts"]
        print(
            f"{images:>8}{texts:>8}{pairs:>10}{seconds:>9.1f}{pairs / seconds:>9.0f}{memory:>9.3f}",
            flush=True,
        )


def blip2(*words: str) -> float:
    """Runs a command; returns the most memory that it held, in 10**9 bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "blip2_jax", *words], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"blip2 {words[0]} ended with {process.returncode}.")
    return used.ru_maxrss * 1024 / 1e9  # Linux counts in KiB


if __name__ == "__main__":
    main()
