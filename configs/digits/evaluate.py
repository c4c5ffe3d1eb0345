"""The three evaluations of the embedded world, and the report.

```bash
blip2 evaluate --config=configs/digits/evaluate.py --workdir=runs/quickstart
```

A training recipe takes some of them as `config.evals = get_config("vqa+caption").tasks`.
"""

from typing import Any

from ml_collections import ConfigDict

from blip2_jax.cli import ConfigError
from configs.eval.default import get_config as default
from configs.eval.default import task

TASKS = ("retrieval", "caption", "vqa", "vqa_held_out")


def get_config(tasks: str = "+".join(TASKS)) -> ConfigDict:
    config = default()
    config.name = "digits-evaluate"
    config.title = "BLIP-2 in the embedded world"
    config.batch_size = 50
    # Which run each task evaluates: as published, retrieval is stage 1's, the others stage 2's.
    config.models = ConfigDict(
        {
            "retrieval": "runs/quickstart/stage1",
            "captioning": "runs/quickstart/stage2",
            "vqa": "runs/quickstart/stage2",
        }
    )
    config.data = ConfigDict(
        {"dir": "runs/quickstart/data", "split": "test", "held_out_split": "held_out"}
    )
    # Greedy, where the published rows take five beams; texts as the world writes them.
    greedy = {
        "num_beams": 1,
        "min_new_tokens": 1,
        "length_penalty_includes_prompt": False,
        "length_penalty_includes_eos": True,
    }
    questions = {"blind": True, "clean_text": False, "forms": ("official",)}
    answers: dict[str, Any] = {**questions, "decoding": {**greedy, "max_new_tokens": 6}}
    config.tasks = ConfigDict(
        {
            "retrieval": task(
                "retrieval", "tfds", "test",
                rerank=16, captions=1, group=100, clean_text=False, truncate=0,
            ),
            "caption": task(
                "captioning", "tfds", "test",
                blind=True, scores=("cider", "bleu4", "rouge_l"), decoding=greedy, examples=24,
            ),
            "vqa": task("vqa", "tfds", "test", **answers),
            "vqa_held_out": task("vqa", "tfds", "held_out", **answers, examples=0),
        }
    )  # fmt: skip
    chosen = tasks.split("+")
    if unknown := set(chosen) - set(TASKS):
        raise ConfigError(f"No task {min(unknown)!r}; known, joined by +: {', '.join(TASKS)}.")
    config.tasks = ConfigDict({name: config.tasks[name] for name in chosen})
    for name, section in config.tasks.items():
        kind = {"retrieval": "retrieval", "caption": "captioning"}.get(name, "vqa")
        split = "held_out_split" if name == "vqa_held_out" else "split"
        section.model = config.models.get_ref(kind)
        section.data.update(
            {"dir": config.data.get_ref("dir"), "split": config.data.get_ref(split)}
        )
    return config
