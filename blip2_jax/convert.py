"""Turn weights from one format into another.

  blip2 convert runs/towers/lm blip2_jax/assets/digits-opt --to=huggingface

SRC is the workdir of a finished run that pre-trained a tower (an image encoder or a language
model); DST becomes a folder that transformers loads: config.json and model.safetensors.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from blip2_jax import cli, recipe
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.vit import ViTConfig
from blip2_jax.runtime import state as states
from blip2_jax.weights import huggingface


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a finished run's workdir")
    parser.add_argument("target", metavar="DST", help="folder to write")
    parser.add_argument("--to", required=True, choices=["huggingface"], help="the format of DST")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="of the written tensors (default: bfloat16, which frozen towers are kept in)",
    )


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(__doc__, argv, add_arguments, config=False)
    return convert(Path(args.source), Path(args.target), jnp.dtype(args.dtype))


def convert(source: Path, target: Path, dtype: Any) -> int:
    """Writes the tower of a finished run as a Hugging Face folder; returns the exit code."""
    run, params = recipe.load_params(source)
    sizes = run.model_config
    if isinstance(sizes, OPTConfig):
        name = "llm"
    elif isinstance(sizes, ViTConfig):
        name = "vit"
    else:
        raise SystemExit(
            f"blip2 convert: {source} trained {run.config.stage.name}, which is no tower; "
            "name the workdir of a pretrain_vit or pretrain_lm run."
        )
    tower = jax.tree.map(lambda x: x.astype(dtype), params[name])
    huggingface.save(target, sizes, tower)
    report = {"fingerprint": states.fingerprint(tower), "parameters": _count(tower)}
    print(f"{target}: {json.dumps(report)}")
    return 0


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    raise SystemExit(main())
