"""BLIP-2 in JAX: two-stage vision-language pre-training with a Querying Transformer.

A model is loaded by `load`, from a Hugging Face folder or hub name, a LAVIS `.pth`, or the workdir
of a run, and is a `Blip2`:

```python
import blip2_jax

model = blip2_jax.load("Salesforce/blip2-opt-2.7b", dtype="bfloat16")
model.caption(["beach.jpg"])  # list[str]
model.answer(["beach.jpg"], ["How many people are there?"])

model = blip2_jax.load("Salesforce/blip2-itm-vit-g")
model.match(images, texts)  # float32[N] in 0..1 (ITM)
model.embed_images(images)  # float32[N, 32, 256] (ITC)
```

That is the public interface for those who use a model. Those who train work with configs and
commands; every config key is explained in `configs.default`, those of evaluations in
`configs.eval.default`.

| module | holds |
| --- | --- |
| `blip2_jax.train`, `blip2_jax.evaluate`, `blip2_jax.generate`, `blip2_jax.convert`, `blip2_jax.plan`, `blip2_jax.prepare`, `blip2_jax.sweep` | one file a command: `blip2 train --help` says the same |
| `blip2_jax.pretrained` | `load`: from a run, a folder or a file to a `Blip2` |
| `blip2_jax.recipe` | from a config to model, shardings and compiled step |
| `blip2_jax.models` | ViT, Q-Former, OPT, Llama, T5, LoRA, and both compositions |
| `blip2_jax.stages` | losses of both stages, the train and eval step, FLOPs |
| `blip2_jax.inference` | `Blip2`, its batches and compiled programs, decoding, published defaults |
| `blip2_jax.weights` | Hugging Face, LAVIS and native checkpoints, in and out |
| `blip2_jax.data` | sources, transforms, tokenizers, batches |
| `blip2_jax.runtime` | mesh, optimizer, state, checkpoints, metrics; knows nothing of BLIP-2 |
| `blip2_jax.training` | a run: its start, its steps, its evaluations |
| `blip2_jax.evals` | tasks, metrics, submissions |
| `blip2_jax.sweeps` | points, backends and results of sweeps |
| `blip2_jax.planning` | what `blip2 plan` computes: topologies, compiled programs, estimates, search |
| `blip2_jax.reporting` | pages of runs, sweeps and data sets |
| `blip2_jax.digits` | the embedded world, and the pre-training of its towers |

Shape words are the same everywhere: `B` batch, `Q` queries, `T` text tokens, `N` image tokens, `H`
heads, `K` width of a head, `D` width of the model, `L` layers, `V` vocabulary.
"""  # noqa: E501

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2_jax.inference.pipeline import Blip2
    from blip2_jax.pretrained import load

__version__ = "0.1.0"
__all__ = ["load", "Blip2", "__version__"]

# What transformers is imported for here (tokenizers, processors) needs no PyTorch; it says at its
# import that there is none, unless told not to.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = {"load": "pretrained", "Blip2": "inference.pipeline"}


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: jax alone takes a second."""
    if name not in _HOMES:
        raise AttributeError(f"module 'blip2_jax' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"blip2_jax.{_HOMES[name]}"), name)
    return globals()[name]
