"""Turn weights from one format into another.

    blip2 convert Salesforce/blip2-opt-2.7b runs/native --to=native --dtype=bfloat16
    blip2 convert runs/stage2 exported/blip2 --to=huggingface
    blip2 convert runs/stage2/checkpoints/5000 exported/earlier --to=huggingface
    blip2 convert blip2_pretrained.pth exported/itm --to=huggingface --vit=eva_vit_g.pth
    blip2 convert exported/blip2 blip2.pth --to=lavis
    blip2 convert runs/towers/lm blip2_jax/assets/digits-opt --to=huggingface

SRC is a Hugging Face folder, a LAVIS .pth, a native folder, the workdir of a run (of BLIP-2, or of
a tower's own pre-training), which stands for its newest checkpoint, or one of its checkpoints
(WORKDIR/checkpoints/STEP). What SRC does not hold (a LAVIS file has no language model and often no
image encoder) is named by flags. Values keep their bits unless --dtype is given; what a format
cannot hold is reported.

DST is new, or empty. What this command wrote before is replaced with --overwrite, in one step: a
killed conversion leaves the old one whole. Anything else is left alone.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from blip2_jax import cli, pretrained
from blip2_jax.data import tokenizers
from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.vit import ViTConfig
from blip2_jax.runtime import outputs, run_dir
from blip2_jax.runtime import state as states
from blip2_jax.weights import checkpoint, files, huggingface, lavis, transfer
from blip2_jax.weights.files import WeightsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `blip2 convert`."""
    parser.add_argument("source", metavar="SRC", help="what to convert (see above)")
    parser.add_argument(
        "target", metavar="DST", help="folder, or for --to=lavis the .pth, to write"
    )
    parser.add_argument("--to", required=True, choices=["huggingface", "lavis", "native"])
    parser.add_argument("--vit", default="", help="the image encoder's folder or .pth")
    parser.add_argument("--llm", default="", help="the language model's folder")
    parser.add_argument(
        "--dtype",
        type=cli.dtype,
        metavar="{float32,bfloat16,float16}",
        help="of what is written (as in SRC)",
    )
    parser.add_argument(
        "--without_vit",
        action="store_true",
        help="--to=lavis: leave the image encoder out, as official pre-trained files do",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what this command wrote to DST before"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would go where, and stop")


def main(argv: list[str] | None = None) -> int:
    """Runs `blip2 convert`; returns its exit code."""
    args = cli.parse(__doc__, argv, add_arguments, prog="blip2 convert", config=False)
    try:
        return convert(args)
    except ValueError as error:
        raise SystemExit(f"blip2 convert: {error}") from error


def convert(args: argparse.Namespace) -> int:
    """Converts; returns the exit code."""
    target, dtype = Path(args.target), args.dtype
    check_target(args)
    run = run_dir.find(args.source)
    if run is not None:
        print(f"{run.folder}: step {run.step} of {run.steps}.")
        config, params, companions, special_tokens = _of_run(run.folder, args.vit, args.llm)
        if not isinstance(config, Blip2Config):
            return _write_tower(args, config, params, dtype)
    else:
        opened = checkpoint.open_checkpoint(args.source, vit=args.vit, llm=args.llm)
        config, companions = opened.config, opened.companions
        special_tokens = opened.llm_special_tokens
        abstract = opened.abstract()
        for planned, share in opened.plans(abstract):
            print(transfer.summary(planned, share))
        if args.dry_run:
            return 0
        params = opened.load(abstract, progress="reading")
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    if args.dry_run:
        return 0
    if args.to == "lavis":
        lavis.save(target, config, params, with_vit=not args.without_vit, overwrite=args.overwrite)
        if "llm" in params:
            print(f"The language model is not in {target}: LAVIS loads it from its own folder.")
    else:
        save = huggingface.save_blip2 if args.to == "huggingface" else checkpoint.save_native
        with _with_special_tokens(companions, special_tokens) as folder:
            save(target, config, params, companions=folder, overwrite=args.overwrite)
    size = transfer.num_bytes(params) / 1e9
    print(f"{target}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {size:.2f} GB.")
    return 0


def check_target(args: argparse.Namespace) -> None:
    """Refuses a DST that holds what was not written here, or what is to be read.

    Raises:
      WeightsError: naming what is there, before anything is read.
    """
    target = Path(args.target).resolve()
    for given in filter(None, (args.source, args.vit, args.llm)):
        source = Path(given).resolve()
        if source.exists() and (
            source == target or source in target.parents or target in source.parents
        ):
            raise WeightsError(f"DST {args.target} is, holds or lies in {given}; name another.")
    if args.to == "lavis":
        lavis.check_target(target, overwrite=args.overwrite)
        return
    try:
        outputs.check_folder(target, overwrite=args.overwrite)
    except outputs.Taken as error:
        raise WeightsError(str(error)) from error


@contextlib.contextmanager
def _with_special_tokens(
    companions: Path | None, special_tokens: Mapping[str, str]
) -> Iterator[Path | None]:
    """The folder of the tokenizer; a copy of it where special tokens are others than its own."""
    if companions is None or not special_tokens:
        yield companions
        return
    with tempfile.TemporaryDirectory() as folder:
        files.copy_companions(companions, Path(folder))
        tokenizers.load(folder, special_tokens).save_pretrained(folder)
        yield Path(folder)


def _of_run(folder: Path, vit: str, llm: str) -> tuple[Any, Any, Path | None, Mapping[str, str]]:
    """Sizes, all parameters, the tokenizer's folder and special tokens of a run's checkpoint."""
    run, params = pretrained.load_run(folder, towers={"vit": vit, "llm": llm})
    source = run.config.model.llm.source if "llm" in params else ""
    companions = huggingface.find(source) if source else None
    special_tokens = run.config.data.llm_special_tokens.to_dict()
    return run.model_config, params, companions, special_tokens


def _write_tower(args: argparse.Namespace, sizes: Any, params: Any, dtype: Any) -> int:
    """Writes what a run of `pretrain_vit` or `pretrain_lm` trained."""
    if args.to != "huggingface":
        raise WeightsError(f"{args.source} holds a tower; towers are written --to=huggingface.")
    name = "vit" if isinstance(sizes, ViTConfig) else "llm"
    # Frozen towers are kept in bfloat16, and their fingerprint is of that.
    tower = jax.tree.map(lambda x: x.astype(dtype or jnp.bfloat16), params[name])
    count = sum(x.size for x in jax.tree.leaves(tower))
    if not args.dry_run:
        huggingface.save(Path(args.target), sizes, tower, overwrite=args.overwrite)
    print(f"{args.target}: {count:,} parameters, fingerprint {states.fingerprint(tower)}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
