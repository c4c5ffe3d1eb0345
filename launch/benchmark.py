"""Measures what docs/benchmarks.md says about speed and memory, each beside a peer, in one run.

  python launch/benchmark.py load --folder=/tmp/opt-2.7b     read full-size weights as bfloat16
  python launch/benchmark.py generate --folder=/tmp/middle   caption images
  python launch/benchmark.py bfloat16 --folder=/tmp/middle   how near bfloat16 stays
  python launch/benchmark.py train [--device=gpu]            the train step of both stages

load: writes a random-valued folder of the very layout of Salesforce/blip2-opt-2.7b (15 GB float32,
shard by shard; kept for the next time), then reads it as bfloat16 here and with transformers'
`from_pretrained`, each in a process of its own: seconds, GB/s of the file, peak memory against
the size of the result.

generate: writes a random-valued BLIP-2 of half a billion parameters (ViT-B, BERT-base Q-Former, an
OPT of 24 layers), and captions the same images with it here, with transformers and, where it is
installed, with keras-hub on JAX: 20 tokens each, greedy and with 5 beams, 1 and 8 images at once,
float32; median of five after a warm-up.

bfloat16: logits of that model for 8 images with 32 tokens of text each, in bfloat16, here and with
transformers, against transformers' float32: the largest error as a share of the largest logit, the
mean error likewise, and the share of positions whose likeliest token stays the same.

train: the compiled step of stage 1 and of stage 2 beside the same step in PyTorch, on random
weights, with dropout and AdamW: on a CPU in float32 with ViT-B, BERT-base and an OPT of 125M, with
--device=gpu in bfloat16 at full size (ViT-g, OPT-2.7B); samples/s, their ratio, and MFU where the
chip's rate is known. Median of five steps after two.
"""

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import benchmark_train

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


# ------------------------------------------------------------------------------------ generate

NEW_TOKENS = 20
CASES = [(beams, batch) for beams in (1, 5) for batch in (1, 8)]


def write_middle(folder: Path) -> None:
    """Half a billion random parameters, with a tokenizer and a processor."""
    import torch
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    from blip2_jax.data import tokenizers

    tokenizer = tokenizers.load("package:digits-opt")
    processor = transformers.Blip2Processor(
        BlipImageProcessorPil(size={"height": 224, "width": 224}), tokenizer, num_query_tokens=32
    )
    torch.manual_seed(SEED)
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 14,
        },
        qformer_config={"encoder_hidden_size": 768},
        text_config={
            "model_type": "opt",
            "vocab_size": 50304,
            "hidden_size": 1024,
            "word_embed_proj_dim": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "eos_token_id": tokenizer("\n")["input_ids"][-1],
            "pad_token_id": tokenizer.pad_token_id,
        },
        num_query_tokens=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _pictures(count: int) -> list:
    import numpy as np

    rng = np.random.default_rng(SEED)
    return list(rng.integers(0, 256, (count, 224, 224, 3)).astype(np.uint8))


def caption_ours(folder: str):
    import blip2_jax

    model = blip2_jax.load(folder, batch_size=8)

    def caption(count: int, beams: int) -> list[str]:
        return model.caption(
            _pictures(count),
            num_beams=beams,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )

    return caption


def caption_theirs(folder: str):
    import torch
    import transformers

    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.Blip2Processor.from_pretrained(folder)

    def caption(count: int, beams: int) -> list[str]:
        inputs = processor(
            images=_pictures(count), text=[""] * count, return_tensors="pt", padding=True
        )
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                num_beams=beams,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )
        ids = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    return caption


def caption_keras(folder: str):
    """keras-hub's BLIP-2 on its JAX backend; token ids in place of texts."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import keras_hub
    import numpy as np

    from blip2_jax.models.vit import normalize_images

    backbone = keras_hub.models.BLIP2Backbone.from_preset(folder)
    model = keras_hub.models.BLIP2CausalLM(preprocessor=None, backbone=backbone)

    def caption(count: int, beams: int) -> list[list[int]]:
        sampler = keras_hub.samplers.BeamSampler(num_beams=beams) if beams > 1 else "greedy"
        if caption.compiled != beams:
            model.compile(sampler=sampler)
            caption.compiled = beams
        ids = np.ones((count, 1 + NEW_TOKENS), np.int32)
        ids[:, 0] = 2
        inputs = {
            "images": np.array(normalize_images(np.stack(_pictures(count)))),
            "token_ids": ids,
            "padding_mask": (np.arange(1 + NEW_TOKENS) < 1) & np.ones_like(ids, bool),
        }
        return np.asarray(model.generate(inputs, stop_token_ids=None)["token_ids"])[:, 1:].tolist()

    caption.compiled = 0
    return caption


CAPTIONERS = {
    "blip2_jax": caption_ours,
    "transformers": caption_theirs,
    "keras_hub": caption_keras,  # if it is installed
}


def generate(args: argparse.Namespace) -> None:
    """Both captioners in processes of their own; a table, and whether they say the same."""
    folder = Path(args.folder)
    if not (folder / "config.json").is_file():
        print(f"Writing {folder} (2 GB) ...")
        write_middle(folder)
    found = {}
    for name in CAPTIONERS:
        if name == "keras_hub" and importlib.util.find_spec("keras_hub") is None:
            continue
        command = [sys.executable, __file__, "generate", f"--folder={folder}", f"--only={name}"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    ours = found.pop("blip2_jax")
    print(f"{'captions/s':<18}{'blip2_jax':>10}" + "".join(f"{name:>26}" for name in found))
    for case, mine in ours.items():
        line = f"{case:<18}{mine['rate']:>10.3f}"
        for name, theirs in found.items():
            ratio = f"({mine['rate'] / theirs[case]['rate']:.2f} x)"
            same = "" if name == "keras_hub" or mine["texts"] == theirs[case]["texts"] else "!"
            line += f"{theirs[case]['rate']:>16.3f}{ratio:>10}{same}"
        print(line)
    print("(x: how many times as fast blip2_jax is; !: other texts than transformers)")


def generate_one(args: argparse.Namespace) -> None:
    """One captioner in this process; prints its figures as JSON."""
    caption = CAPTIONERS[args.only](args.folder)
    found = {}
    for beams, batch in CASES:
        texts = caption(batch, beams)  # warm: compiled, allocated
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            caption(batch, beams)
            seconds.append(time.perf_counter() - started)
        rate = batch / sorted(seconds)[len(seconds) // 2]
        found[f"{beams} beams, batch {batch}"] = {"rate": rate, "texts": texts}
    print(json.dumps(found))


# ------------------------------------------------------------------------------------ bfloat16


def bfloat16(args: argparse.Namespace) -> None:
    """Four sets of logits of one model, compared."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    import transformers
    from flax import nnx

    from blip2_jax.models.blip2 import make_model
    from blip2_jax.models.vit import normalize_images
    from blip2_jax.weights import checkpoint

    folder = Path(args.folder)
    if not (folder / "config.json").is_file():
        print(f"Writing {folder} (2 GB) ...")
        write_middle(folder)
    images = np.stack(_pictures(8))
    ids = np.random.default_rng(SEED).integers(4, 50_000, (8, 32))
    found = {}

    pixels = torch.tensor(np.array(normalize_images(images))).permute(0, 3, 1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        image = torch.full((8, 32), model.config.image_token_index)
        with torch.no_grad():
            out = model.eval()(pixels, torch.cat([image, torch.tensor(ids)], dim=1)).logits
        found["transformers", str(dtype).removeprefix("torch.")] = out[:, 31:-1].float().numpy()
        del model

    opened = checkpoint.open_checkpoint(str(folder))
    for dtype in ("float32", "bfloat16"):
        like = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        params = opened.load(jax.tree.map(lambda x: like(x.shape), opened.abstract()))  # noqa: B023
        make = functools.partial(make_model, opened.config, dtype=jnp.dtype(dtype))
        graph = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))  # noqa: B023

        @functools.partial(jax.jit, static_argnames="graph")
        def logits(graph, params, images, ids):
            model = nnx.merge(graph, params)
            return model.language_logits(model.visual_prompt(images), ids, jnp.ones_like(ids))

        found["blip2_jax", dtype] = np.asarray(logits(graph, params, images, ids))

    exact = found["transformers", "float32"]
    print(f"{'':<26}{'largest error':>14}{'mean error':>12}{'same token':>12}")
    for (name, dtype), got in found.items():
        error = np.abs(got - exact) / np.abs(exact).max()
        same = (got.argmax(-1) == exact.argmax(-1)).mean()
        print(f"{name + ' ' + dtype:<26}{error.max():>14.2e}{error.mean():>12.2e}{same:>12.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    loading = commands.add_parser("load", help="full-size weights, beside transformers")
    loading.add_argument("--folder", required=True, help="where the 15 GB are, or go")
    loading.add_argument("--only", choices=list(LOADERS), help=argparse.SUPPRESS)
    loading.set_defaults(run=lambda args: load_one(args) if args.only else load(args))
    captioning = commands.add_parser("generate", help="captions, beside transformers")
    captioning.add_argument("--folder", required=True, help="where the 2 GB are, or go")
    captioning.add_argument("--only", choices=list(CAPTIONERS), help=argparse.SUPPRESS)
    captioning.set_defaults(run=lambda args: generate_one(args) if args.only else generate(args))
    rounding = commands.add_parser("bfloat16", help="how near bfloat16 stays")
    rounding.add_argument("--folder", required=True, help="as for generate")
    rounding.set_defaults(run=bfloat16)
    training = commands.add_parser("train", help="train steps, beside PyTorch")
    benchmark_train.add_arguments(training)
    args = parser.parse_args()
    if getattr(args, "only", None) != "blip2_jax" and not importlib.util.find_spec("torch"):
        sys.exit("benchmark.py: the peers run on PyTorch: pip install 'blip2_jax[convert]'.")
    args.run(args)


if __name__ == "__main__":
    main()
