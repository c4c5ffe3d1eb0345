"""Captioning after fine-tuning on COCO (paper, table 3): NoCaps by domain, and COCO's test split.

    blip2 evaluate --config=configs/eval/caption.py:vitg-opt2.7b --workdir=DIR
    blip2 evaluate --config=configs/eval/caption.py:vitg-opt2.7b --workdir=DIR --model=runs/caption

NoCaps wants the owners' nocaps_val_4500_captions.json, which names each image's domain. Beams and
lengths are those of LAVIS's COCO configs, with the meaning that they had then. LAVIS has since
added a repetition penalty of 1.15 and a length penalty of 0 to its task, which the paper's numbers
were made without.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import published
from configs.eval.default import get_config as default
from configs.eval.default import published_decoding, task

# CIDEr and SPICE of NoCaps in, near, out and overall; COCO's BLEU-4 and CIDEr (paper, table 3).
PAPER = {
    "vitg-opt2.7b": (
        (123.0, 15.8, 117.8, 15.4, 123.4, 15.1, 119.7, 15.4, 43.7, 145.8),
        "Salesforce/blip2-opt-2.7b-coco",
    ),
    "vitg-opt6.7b": (
        (123.7, 15.8, 119.2, 15.3, 124.4, 14.8, 121.0, 15.3, 43.5, 145.2),
        "Salesforce/blip2-opt-6.7b-coco",
    ),
    "vitg-flant5xl": (
        (123.7, 16.3, 120.2, 15.9, 124.8, 15.1, 121.6, 15.8, 42.4, 144.5),
        "Salesforce/blip2-flan-t5-xl-coco",
    ),
}
VARIANTS = tuple(PAPER)
NOCAPS = [f"{part}{score}" for part in ("in_", "near_", "out_", "") for score in ("cider", "spice")]


def get_config(variant: str = "vitg-opt2.7b") -> ConfigDict:
    _, llm = published.words(variant, tuple(published.VITS), tuple(published.LLMS))
    options: dict[str, Any] = {
        "prompt": "a photo of",
        "decoding": published_decoding(llm, "captioning"),
    }
    config = default()
    config.name = f"caption-{variant}"
    scores, config.model = PAPER.get(variant, ((), ""))
    config.tasks = ConfigDict(
        {
            "nocaps": task("captioning", "nocaps", "val", by="domain", **options),
            "coco": task("captioning", "coco", "test", **options),
        }
    )
    config.published.update(
        {
            "table": "3",
            "row": variant,
            "weights": config.model,
            "scores": {
                "nocaps": dict(zip(NOCAPS, scores, strict=False)),
                "coco": dict(zip(("bleu4", "cider"), scores[len(NOCAPS) :], strict=False)),
            },
        }
    )
    return config
