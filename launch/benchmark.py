"""Measures what the README says about speed and memory, each beside a peer, in one run.

  python launch/benchmark.py load --folder=/tmp/opt-2.7b     read full-size weights as bfloat16

load: writes a random-valued folder of the very layout of Salesforce/blip2-opt-2.7b (15 GB float32,
shard by shard; kept for the next time), then reads it as bfloat16 here and with transformers'
`from_pretrained`, each in a process of its own: seconds, GB/s of the file, peak memory against
the size of the result.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SEED = 0


def write_folder(folder: Path) -> None:
    """A random-valued blip2-opt-2.7b, as the hub has it."""
    import numpy as np

    from blip2_jax.models.blip2 import Blip2Config
    from blip2_jax.models.opt import OPTConfig
    from blip2_jax.runtime.mesh import nested
    from blip2_jax.weights import checkpoint, configs, files, huggingface, transfer

    config = Blip2Config(llm=OPTConfig(vocab_size=50304, dropout=0.1), ln_vision_eps=1e-6)
    rng = np.random.default_rng(SEED)

    class Random:
        """An array that is drawn when one layer of it is asked for."""

        dtype = np.dtype(np.float32)

        def __init__(self, shape):
            self.shape = shape

        def __getitem__(self, where):
            return rng.normal(0, 0.02, self.shape[len(where) :]).astype(np.float32)

    leaves = transfer.leaves_of(checkpoint.abstract_params(config))
    drawn = nested({path: Random(leaf.shape) for path, leaf in leaves.items()})
    size = 4 * sum(leaf.size for leaf in leaves.values())
    with files.writing(folder, size) as draft:
        table = huggingface.blip2_table(config)
        files.write_shards(draft, transfer.tensors_of(table, drawn))
        document = configs.write_blip2(config, image_token_index=50265)
        (draft / "config.json").write_text(json.dumps(document, indent=2))


def load_ours(folder: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from blip2_jax.weights import checkpoint

    started = time.perf_counter()
    found = checkpoint.open_checkpoint(folder)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), found.abstract())
    params = jax.block_until_ready(found.load(abstract, progress="reading"))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "gb": sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9}


def load_theirs(folder: str) -> dict[str, float]:
    import torch
    import transformers

    started = time.perf_counter()
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "gb": sum(p.nbytes for p in model.parameters()) / 1e9}


LOADERS = {"blip2_jax": load_ours, "transformers": load_theirs}


def load(args: argparse.Namespace) -> None:
    """Both loaders in processes of their own."""
    folder = Path(args.folder)
    if not (folder / "config.json").is_file():
        print(f"Writing {folder} (15 GB) ...")
        write_folder(folder)
    file_gb = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    for name in LOADERS:
        command = [sys.executable, __file__, "load", f"--folder={folder}", f"--only={name}"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(
            f"{name:<13} {found['seconds']:6.1f} s  {file_gb / found['seconds']:5.2f} GB/s  "
            f"{found['gb']:.2f} GB, peak {found['peak_gb']:.2f} GB "
            f"({found['peak_gb'] / found['gb']:.2f} x)"
        )


def load_one(args: argparse.Namespace) -> None:
    """One loader in this process; prints its figures as JSON."""
    import resource

    found = LOADERS[args.only](args.folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({**found, "peak_gb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    loading = commands.add_parser("load", help="full-size weights, beside transformers")
    loading.add_argument("--folder", required=True, help="where the 15 GB are, or go")
    loading.add_argument("--only", choices=list(LOADERS), help=argparse.SUPPRESS)
    loading.set_defaults(run=lambda args: load_one(args) if args.only else load(args))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
