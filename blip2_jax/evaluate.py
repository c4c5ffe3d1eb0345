"""Evaluate a model as the paper reports it: question answering, captioning, retrieval, ranking.

    blip2 evaluate --config=configs/eval/vqa.py:vitg-flant5xl --workdir=runs/eval/vqa
    blip2 evaluate --config=configs/eval/caption.py:vitg-opt2.7b --workdir=DIR --model=runs/caption
    blip2 evaluate --config=configs/digits/evaluate.py --workdir=runs/quickstart
    blip2 evaluate --config=configs/eval/vqa.py:vitg-flant5xl --workdir=DIR --task=okvqa \\
        --config.tasks.okvqa.data.dir=/data/okvqa --config.tasks.okvqa.decoding.num_beams=1
    blip2 evaluate --config=configs/eval/caption.py:vitg-opt2.7b --workdir=DIR --task=coco \\
        --predictions=captions_of_another_system.json

A config in configs/eval is one row of the paper's tables, with every prompt, beam and penalty that
it was made with; configs/eval/default.py explains each key. SRC of --model is a run's workdir
(its newest checkpoint, finished or not), one of its checkpoints (WORKDIR/checkpoints/STEP), a
Hugging Face folder or hub name, a native folder or a LAVIS .pth (with --config.vit, --config.llm);
one model serves all the tasks that it has the heads for.

The exit code is 0 at the end, and 42 when it was told to stop (SIGTERM), which it does after the
current batch: the same command goes on. The workdir receives

    predictions/NAME.json       a task's predictions, in the form that evaluation servers take
    predictions/NAME.*.jsonl    the same, image by image, as each process makes them: the same
                                command goes on where it was stopped, and refuses those that were
                                made with other settings
    metrics.json                scores, all settings that they were made with, and what was left
                                out and why
    report.html                 a page with scores and examples

Scores are fractions of 1, CIDEr-D is on its own scale of 10; a score ending in _blind is the same
thing done without the image. With BLIP2_DISTRIBUTED=1 hosts share the images; each holds the model.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from blip2_jax import cli
from blip2_jax.evals.evaluator import Evaluator
from blip2_jax.runtime import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `blip2 evaluate`."""
    parser.add_argument("--workdir", required=True, help="folder for the results")
    parser.add_argument(
        "--model", default="", metavar="SRC", help="instead of what the config names"
    )
    parser.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument(
        "--predictions",
        default="",
        metavar="FILE",
        help="score a file in a server's form instead of a model; needs a single task",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs `blip2 evaluate`; returns its exit code."""
    args = cli.parse(__doc__, argv, add_arguments, prog="blip2 evaluate")
    try:
        return evaluate(args.config, Path(args.workdir), args.model, args.task, args.predictions)
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"blip2 evaluate: {error}") from error


def evaluate(
    config: ConfigDict,
    workdir: Path,
    model: str = "",
    only: Sequence[str] = (),
    predictions: str = "",
) -> int:
    """Runs the tasks of a config; returns the exit code.

    Args:
      config: see `configs/eval/default.py`.
      workdir: receives the results.
      model: what all tasks evaluate, instead of what the config names.
      only: names of tasks; none: all.
      predictions: a file to score instead of a model.

    Raises:
      ValueError: everything that does not fit, as early as it can be known.
    """
    started = time.monotonic()
    distributed.initialize(config.distributed)
    distributed.setup_compilation_cache()
    cli.make_workdir(workdir)
    with distributed.StopSignal() as stop:
        try:
            evaluator = Evaluator(config, workdir, stop, only)
            if predictions:
                evaluator.score_file(predictions)
            else:
                evaluator.run(model)
            evaluator.finish(time.monotonic() - started)
        except distributed.Stopped:
            if distributed.is_first_process():
                print("Asked to stop. The same command goes on.")
            return distributed.PREEMPTED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
