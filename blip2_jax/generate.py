"""Caption images, or answer about them.

    blip2 generate --model=runs/quickstart/stage2 --image=photo.jpg
    blip2 generate --model=Salesforce/blip2-opt-2.7b --image=photos/ --dtype=bfloat16 --json
    blip2 generate --model=SRC --image='shots/*.png' --prompt="Question: how many? Answer:"
    blip2 generate --model=SRC --image=@list.txt --output=captions.jsonl
    blip2 generate --model=SRC --image=photos/ --output=captions.jsonl

SRC is a Hugging Face folder or hub name, a LAVIS .pth (with --vit and --llm), a native folder, the
workdir of a run, finished or not, or one of its checkpoints (WORKDIR/checkpoints/STEP). Images may
be files, folders (searched for images, not into their subfolders), patterns, and @list.txt, a file
with a name a line. One line an image: its name, a tab, the text (and with --return_scores a tab
and its log-probability); as JSON with --json. With
--output, lines go into a file, and the same command goes on where it was stopped. Images that
cannot be read are reported and left out; the exit code is then 1.

Without a --prompt images are captioned. Unless flags say otherwise, decoding is as published:

"""

import argparse
import contextlib
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from blip2_jax import cli
from blip2_jax.data import files
from blip2_jax.data.containers import IMAGE_SUFFIXES, decode
from blip2_jax.data.faults import RecordError
from blip2_jax.data.transforms import ImageError
from blip2_jax.inference import defaults
from blip2_jax.inference.batching import check_batch_size
from blip2_jax.inference.images import open_image
from blip2_jax.inference.options import SYNONYMS, Decoding
from blip2_jax.inference.outputs import ScoredText
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.pretrained import load
from blip2_jax.runtime import journal, run_dir
from blip2_jax.runtime.journal import Journal
from blip2_jax.runtime.values import unescape

NUMBERS = {
    "num_beams": "width of the beam search; 1: greedy",
    "max_new_tokens": "the most tokens to generate",
    "min_new_tokens": "the fewest",
    "length_penalty": "above 0 favors long texts, below 0 short ones",
    "repetition_penalty": "above 1 avoids tokens that were seen",
    "no_repeat_ngram_size": "no n-gram of this size is repeated; 0: any may be",
    "temperature": "of sampling",
    "top_k": "sample from the k likeliest tokens only",
    "top_p": "sample from the fewest tokens that hold this share",
    "num_return_sequences": "texts an image",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `blip2 generate`."""
    parser.add_argument("--model", required=True, metavar="SRC", help="see above")
    parser.add_argument(
        "--image", required=True, action="append", metavar="FILE", help="may be given repeatedly"
    )
    parser.add_argument(
        "--prompt", type=unescape, help="what to continue; without it, images are captioned"
    )
    parser.add_argument(
        "--question", type=unescape, help="instead of --prompt: asked in the published form"
    )
    parser.add_argument("--json", action="store_true", help="lines of JSON")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write there, resumably; JSON lines")
    parser.add_argument("--stream", action="store_true", help="show a text as it is generated")
    parser.add_argument(
        "--dtype",
        type=cli.dtype,
        metavar="{float32,bfloat16,float16}",
        help="to compute in (as stored)",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images at once (16)")
    parser.add_argument("--vit", default="", help="the image encoder's folder or .pth (LAVIS)")
    parser.add_argument("--llm", default="", help="the language model's folder (LAVIS)")
    parser.add_argument("--do_sample", action="store_true", default=None, help="draw texts")
    parser.add_argument(
        "--return_scores", action="store_true", help="log-probabilities too, of text and tokens"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --do_sample")
    kinds = Decoding.__annotations__
    for name, what in NUMBERS.items():
        parser.add_argument(f"--{name}", type=kinds[name], help=what)


def main(argv: list[str] | None = None) -> int:
    """Runs `blip2 generate`; returns its exit code."""
    doc = __doc__ + defaults.table()
    args = cli.parse(
        doc, argv, add_arguments, prog="blip2 generate", config=False, synonyms=SYNONYMS
    )
    try:
        return generate(args)
    except ValueError as error:
        raise SystemExit(f"blip2 generate: {error}") from error


def generate(args: argparse.Namespace) -> int:
    """Generates a text for every image; returns the exit code."""
    if args.prompt is not None and args.question is not None:
        raise ValueError("give --prompt or --question, not both.")
    check_batch_size(args.batch_size)
    names = find_images(args.image)
    options = {name: getattr(args, name) for name in (*NUMBERS, "do_sample")}
    options = {name: value for name, value in options.items() if value is not None}
    request = {"model": args.model, "prompt": args.prompt, "question": args.question, **options}
    run = run_dir.find(args.model)
    if run is not None:  # its newest checkpoint may be another one next time
        request["weights"] = run.stamp
    if args.return_scores:
        if args.stream:
            raise ValueError("--stream has no scores; leave --return_scores out.")
        request["return_scores"] = True
    output = Path(args.output) if args.output else None
    records = journal.read(output, request, "blip2 generate") if output else []
    done = {record["image"] for record in records}
    remaining = [name for name in names if name not in done]
    if done:
        print(f"{output}: {len(names) - len(remaining)} of {len(names)} images were done before.")
    if not remaining:
        return 0
    mesh = {"data": 1, "fsdp": -1, "tensor": 1} if jax.device_count() > 1 else None
    model = load(
        args.model if run is None else run.folder,
        dtype=args.dtype,
        mesh=mesh,
        vit=args.vit,
        llm=args.llm,
        batch_size=args.batch_size,
    )
    if args.stream:
        return stream(model, remaining, args, options)
    failed = 0
    with Journal(output, request) if output else contextlib.nullcontext() as file:
        bar = tqdm(total=len(remaining), unit=" images", disable=None if output else True)
        for batch in _batches(remaining, args.batch_size):
            records = describe(model, batch, args, options)
            failed += sum("error" in record for record in records)
            if file is not None:
                file.write(records)
            else:
                print("\n".join(_line(record, args.json) for record in records), flush=True)
            bar.update(len(batch))
        bar.close()
    if failed:
        print(f"{failed} of {len(remaining)} images could not be read.", file=sys.stderr)
    return 1 if failed else 0


def describe(
    model: Blip2, names: Sequence[str], args: argparse.Namespace, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """A text, or what went wrong, for each of a batch of images."""
    opened: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            opened[name] = open_image(name)
        except ImageError as error:
            records[name] = {"image": name, "error": str(error)}
            print(f"{name}: {error}", file=sys.stderr)
    if opened:
        images = list(opened.values())
        options = {**options, "seed": args.seed, "return_scores": args.return_scores}
        if args.question is not None:
            texts = model.answer(images, [args.question] * len(images), **options)
        elif args.prompt is not None:
            texts = model.generate(images, args.prompt, **options)
        else:
            texts = model.caption(images, **options)
        for name, text in zip(opened, texts, strict=True):
            records[name] = {"image": name, **_fields(text)}
    return [records[name] for name in names]


def _fields(text: Any) -> dict[str, Any]:
    """A text, a scored text or several, as fields of a JSON record."""
    if isinstance(text, list):
        each = [_fields(one) for one in text]
        return {key: [fields[key] for fields in each] for key in each[0]}
    if not isinstance(text, ScoredText):
        return {"text": text}
    return {
        "text": text.text,
        "log_prob": round(text.log_prob, 4),
        "token_ids": text.token_ids.tolist(),
        "token_log_probs": [round(value, 4) for value in text.token_log_probs.tolist()],
    }


def stream(
    model: Blip2, names: Sequence[str], args: argparse.Namespace, options: dict[str, Any]
) -> int:
    """Shows each text as it is generated."""
    for name in names:
        print(f"{name}\t", end="", flush=True)
        for piece in model.stream(name, args.prompt or "", question=args.question, **options):
            print(piece, end="", flush=True)
        print()
    return 0


def _line(record: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps(record, ensure_ascii=False)
    text = record.get("text", f"({record.get('error')})")
    parts = [record["image"], text if isinstance(text, str) else " | ".join(text)]
    if "log_prob" in record:
        log_probs = record["log_prob"]
        log_probs = log_probs if isinstance(log_probs, list) else [log_probs]
        parts.append(" | ".join(f"{log_prob:.4f}" for log_prob in log_probs))
    return "\t".join(parts)


def _batches(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def find_images(given: Sequence[str]) -> list[str]:
    """Files named one by one, in folders, by patterns or in lists; each once, in a fixed order.

    Raises:
      ValueError: something given finds nothing.
    """
    paths: dict[str, None] = {}
    for name in given:
        if name.startswith("@") and not Path(name).exists():
            matches = _listed(name[1:])
        else:
            matches = _images_of(name)
        if not matches:
            raise ValueError(f"--image={name}: no such image, or a folder or list without any.")
        paths |= dict.fromkeys(matches)
    return list(paths)


def _images_of(name: str) -> list[str]:
    """A file, or the images of a folder or pattern; what is there under that name is that."""
    path = Path(name)
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file())
        images = [str(p) for p in inside if p.suffix[1:].lower() in IMAGE_SUFFIXES]
        others = [p.name for p in inside if p.suffix[1:].lower() not in IMAGE_SUFFIXES]
        if others:
            some = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            print(f"{name}: {len(others)} other files are skipped ({some}).", file=sys.stderr)
        return images
    if path.exists() or "://" in name:
        return [name]
    return files.matches(name) if glob.has_magic(name) else []


def _listed(path: str) -> list[str]:
    """The images that a file of names has, one a line: from where we are, or beside the list.

    What is not there stays, to be reported as an image that cannot be read.
    """
    try:
        text = decode(files.read(path))
    except RecordError as error:
        raise ValueError(f"--image=@{path}: {error.reason}.") from error
    paths = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        beside = str(Path(path).parent / line)
        paths += _images_of(line) or _images_of(beside) or [line]
    return paths


if __name__ == "__main__":
    raise SystemExit(main())
