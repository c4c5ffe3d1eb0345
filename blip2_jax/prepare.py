"""Turn what you have into shards that training reads: ArrayRecord, with random access.

    blip2 prepare --source=digits --out=runs/quickstart/data
    blip2 prepare --source=files --dir=cc3m/ --out=data/cc3m                  img2dataset's tars
    blip2 prepare --source=files --dir=list.jsonl --images=photos/ --out=data/mine
    blip2 prepare --source=coco --dir=/data/coco --split=train --out=data/coco
    blip2 prepare --source=files --dir=cc3m/ --check                          look, write nothing
    blip2 prepare --source=files --dir=cc3m/ --out=data/new --capfilt --model=runs/stage2 \\
        --ranker=runs/stage1

digits: the embedded world, scenes of real handwritten digits with captions and questions, drawn
here; the same seed and sizes give the same bytes. files: a folder of tars (webdataset,
img2dataset), lists (.json, .jsonl, .csv, .tsv, .parquet, .arrow) of images with captions or
questions, a folder that Hugging Face's datasets saved, or a folder of images beside texts (a.jpg,
a.txt); local, or gs://... Every other source is a data set in the form that its owners publish.

Columns of lists are known by their usual names; --columns image=filepath,caption=title says
others. Where rows name a split, only those of --split are read. Paths of images begin in the
list's folder, or in --images, and stay inside; ../ and absolute paths need an --images that holds
them, absolute ones of a local list also none.

Every image is decoded; what cannot be used is left out, and counted by reason. A run that was
killed goes on where it was with the same command; a folder that is finished is left as it is.
Several splits may go into one folder, one command each. The folder is a TFDS data set with a card
(README.md) and a page of histograms and pictures (report.html). --check leaves with exit code 1
if anything would be left out.

--capfilt writes new captions (Li et al. 2022, and section 3.4 of BLIP-2): the model makes
--samples of them for every image, the ranker's image-text similarity orders them and those that
were there, and the best --keep stay.
"""

import argparse
import json
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from blip2_jax import cli
from blip2_jax.data import datasets, files, lists, shards, sources, tars, transforms
from blip2_jax.data.faults import Skipped
from blip2_jax.data.prepared import PREPARED, read_json
from blip2_jax.data.source import Source
from blip2_jax.reporting import dataset_card
from blip2_jax.runtime.outputs import Own

PAGES = ("README.md", "report.html")  # which people may have changed
FILES = "files"
# Sources that prepare themselves: modules with `add_arguments(parser)` and `prepare(args)`.
OTHERS = {"digits": "blip2_jax.digits.prepare"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `blip2 prepare`."""
    others = _others()
    known = [*others, FILES, *datasets.NAMES]
    parser.add_argument("--source", required=True, choices=known, help="what to prepare")
    parser.add_argument("--out", default="", help="folder to write; made if need be")
    for module in others.values():
        module.add_arguments(parser)
    group = parser.add_argument_group("everything else")
    group.add_argument(
        "--dir", action="append", default=[], help="file, folder, glob or braces; may be repeated"
    )
    group.add_argument("--images", default="", help="folder of the images that lists name")
    group.add_argument("--split", default="train", help="which split this is (default: train)")
    group.add_argument(
        "--form",
        default="image",
        choices=["image", "caption", "question"],
        help="of lists: what makes a record (default: image)",
    )
    group.add_argument(
        "--columns",
        default="",
        metavar="FIELD=COLUMN,...",
        help="of lists: which column holds what, e.g. image=filepath,caption=title",
    )
    group.add_argument("--name", default="", help="of the data set (default: the source's)")
    group.add_argument(
        "--shorter_side", type=int, default=0, help="make larger images smaller; 0: bytes as are"
    )
    group.add_argument(
        "--alpha_background",
        default=transforms.WHITE,
        metavar="COLOR",
        help="behind transparent images that are made smaller; drop: alpha is (default: white)",
    )
    group.add_argument(
        "--records_per_shard", type=int, default=4096, help="of the source (default: 4096)"
    )
    group.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes; 0: this one (default: cores)",
    )
    group.add_argument(
        "--max_skipped",
        type=float,
        default=0.5,
        help="share of records that may be left out before it stops (default: 0.5)",
    )
    group.add_argument("--check", action="store_true", help="validate only; writes nothing")
    group = parser.add_argument_group("new captions")
    group.add_argument("--capfilt", action="store_true", help="caption and filter; see above")
    group.add_argument("--model", default="", help="what captions (a stage-2 model)")
    group.add_argument("--ranker", default="", help="what ranks (a stage-1 model)")
    group.add_argument("--samples", type=int, default=10, help="captions an image (default: 10)")
    group.add_argument("--keep", type=int, default=2, help="the best of them (default: 2)")


def _others() -> dict[str, Any]:
    """The modules of `OTHERS` that are installed."""
    installed = {}
    for name, module in OTHERS.items():
        try:
            installed[name] = import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or ""):  # a library that it needs
                raise
    return installed


def main(argv: list[str] | None = None) -> int:
    """Runs `blip2 prepare`; returns its exit code."""
    args = cli.parse(__doc__, argv, add_arguments, prog="blip2 prepare", config=False)
    if not args.out and not args.check:
        raise SystemExit("blip2 prepare: name a folder to write with --out.")
    if args.source in OTHERS:
        code: int = _others()[args.source].prepare(args)
        return code
    for name in ("records_per_shard", "samples", "keep"):
        if getattr(args, name) < 1:
            raise SystemExit(f"blip2 prepare: --{name} must be at least 1.")
    try:
        transforms.background_color(args.alpha_background)
        return prepare_pairs(args)
    except ValueError as error:
        raise SystemExit(f"blip2 prepare: {error}") from error


# ----------------------------------------------------------------------------- image-text pairs


def open_source(args: argparse.Namespace) -> Source:
    """The source that the flags name."""
    if not args.dir:
        raise ValueError(f"--source={args.source} needs --dir.")
    if args.source == FILES:
        return sources.open_files(
            args.dir,
            images=args.images,
            split=args.split,
            form=args.form,
            columns=args.columns,
        )
    if len(args.dir) > 1:
        raise ValueError(f"--source={args.source} takes one --dir.")
    return datasets.open_dataset(
        args.source, args.dir[0], args.split, args.images, form=args.form, columns=args.columns
    )


def prepare_pairs(args: argparse.Namespace) -> int:
    """Writes a split of image-text pairs, or checks it; returns the exit code.

    Raises:
      ValueError: what is wrong, and what to do.
    """
    settings = _settings(args)
    done = read_json(args.out, PREPARED) if args.out and not args.check else {}
    before = done.get("splits", {}).get(args.split)
    if done and "splits" not in done:
        raise ValueError(f"{args.out} holds other data; name another --out.")
    if before:
        if before["settings"] != settings:
            raise ValueError(
                f"{args.out} holds another {args.split!r} ({before['settings']}); name another "
                "--out or --split."
            )
        print(f"{args.out}: {args.split} prepared before.")
        return 0
    started = time.monotonic()
    source = open_source(args)
    _print_rows(source)
    plan = make_plan(args, source)
    if not plan.check:
        _claim(plan, settings)
    captions = _captioner(args) if args.capfilt else None
    summary = shards.write_all(
        source, plan, workers=args.workers, max_skipped=args.max_skipped, captions=captions
    )
    seconds = time.monotonic() - started
    _print(args, summary, seconds)
    if args.check:
        return 1 if summary["skipped"] else 0
    summary |= {
        "settings": settings,
        "seconds": seconds,
        "image_numbers": source.image_numbers,
    }
    _finish(plan, done.get("splits", {}), summary)
    return 0


def make_plan(args: argparse.Namespace, source: Source) -> shards.Plan:
    """Which shard holds what; keys that occur in several archives are found here."""
    repeated: frozenset[int] = frozenset()
    if isinstance(source, tars.TarSource):
        _, first = np.unique(source.keys(), return_index=True)
        repeated = frozenset(np.setdiff1d(np.arange(len(source)), first).tolist())
    return shards.Plan(
        out=args.out,
        name=args.name or (args.source if args.source != FILES else "pairs"),
        split=args.split,
        records=len(source),
        records_per_shard=args.records_per_shard,
        shorter_side=args.shorter_side,
        check=args.check,
        duplicates=repeated,
        alpha_background=args.alpha_background,
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the bytes that are written."""
    names = ["source", "dir", "images", "form", "columns", "shorter_side", "records_per_shard"]
    names += ["alpha_background"]
    if args.capfilt:
        names += ["model", "ranker", "samples", "keep"]
    return {name: getattr(args, name) for name in names}


def _claim(plan: shards.Plan, settings: dict[str, Any]) -> None:
    """Takes the folder for this plan, or finds that another has it."""
    fs, inner = files.filesystem(plan.out)
    name = f"{plan.split}.plan.json"
    wanted = {**settings, "name": plan.name, "records": plan.records}
    claimed = read_json(plan.out, name)
    if claimed and claimed != wanted:
        raise ValueError(
            f"{plan.out} holds the beginning of another {plan.split!r} ({claimed}); this is "
            f"{wanted}. Name another --out, or remove what is there."
        )
    if not claimed and fs.exists(inner):
        there = {os.path.basename(path.rstrip("/")) for path in fs.ls(inner, detail=False)}
        if there and not any(file.endswith(".plan.json") for file in there):
            raise ValueError(f"{plan.out} is not empty and not ours; name another --out.")
    if files.is_local(plan.out):
        Own(Path(plan.out), "blip2 prepare").check(*PAGES)
        os.makedirs(os.path.join(plan.out, "shards"), exist_ok=True)
    files.write(files.join(plan.out, name), json.dumps(wanted, indent=1).encode())


def _finish(plan: shards.Plan, splits: dict[str, Any], summary: dict[str, Any]) -> None:
    """Metadata, card and page of all splits that are there; then the mark that it is done."""
    splits = {**splits, plan.split: summary}
    lengths = {name: (of["lengths"], of["totals"]["bytes"]) for name, of in splits.items()}
    shards.write_metadata(plan, "Image-text pairs, prepared by blip2_jax.", lengths)
    texts = (
        dataset_card.markdown_card(plan.name, splits),
        dataset_card.histogram_page(plan.name, splits),
    )
    for name, text in zip(PAGES, texts, strict=True):
        if files.is_local(plan.out):
            with Own(Path(plan.out), "blip2 prepare").replacing(name) as draft:
                draft.write_text(text, encoding="utf-8")
        else:
            files.write(files.join(plan.out, name), text.encode())
    seconds = sum(of["seconds"] for of in splits.values())
    done = json.dumps({"splits": splits, "seconds": seconds})
    files.write(files.join(plan.out, PREPARED), done.encode())


def _print_rows(source: Source) -> None:
    """What became of the rows of lists; each was used or left out."""
    if not isinstance(source, lists.ListSource):
        return
    counts = source.counts
    others = f" (and {counts.other_splits:,} of other splits)" if counts.other_splits else ""
    print(
        f"{source.name}: {counts.read:,} rows read{others} = {counts.used:,} used + "
        f"{counts.skipped:,} skipped; the used ones make {len(source):,} records."
    )
    if source.notes.count:
        print(f"Left out of rows that are used:\n{source.notes.text()}")


def _print(args: argparse.Namespace, summary: dict[str, Any], seconds: float) -> None:
    skipped = Skipped()
    skipped.merge(summary["skipped"])
    skipped.total = summary["totals"]["records"] + skipped.count
    totals = summary["totals"]
    where = f"{args.out}: " if not args.check else "usable: "
    print(
        f"{where}{totals['records']:,} {args.split} records, {totals['captions']:,} captions, "
        f"{totals['questions']:,} questions, {totals['bytes'] / 1e6:,.1f} MB in {seconds:.0f} s"
    )
    skipped.report()


def _captioner(args: argparse.Namespace) -> shards.Captions:
    from blip2_jax.data import capfilt

    if not args.model or not args.ranker:
        raise ValueError("--capfilt needs --model (it captions) and --ranker (it ranks).")
    import blip2_jax

    captioner, ranker = (blip2_jax.load(source) for source in (args.model, args.ranker))
    return capfilt.CapFilt(
        capfilt.caption_by(captioner, args.samples),
        capfilt.similarity_by(ranker),
        keep=args.keep,
    )


if __name__ == "__main__":
    raise SystemExit(main())
