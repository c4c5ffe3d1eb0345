"""Image-text retrieval after fine-tuning on COCO (paper, table 5): Flickr30k zero-shot, and COCO.

    blip2 evaluate --config=configs/eval/retrieval.py:vitg --workdir=DIR
    blip2 evaluate --config=configs/eval/retrieval.py:vitg --workdir=DIR --model=runs/retrieval

ITC over all pairs picks 128 candidates for each image and each text, which ITM reads; the score is
the sum of ITM's logit and ITC's cosine, as in LAVIS.
"""

from ml_collections import ConfigDict

from configs import published
from configs.eval.default import get_config as default
from configs.eval.default import task

WAYS = ("image_to_text", "text_to_image")
# R@1, 5, 10 of texts, then of images: Flickr30k, COCO (paper, table 5).
PAPER = {
    "vitl": (
        (96.9, 100.0, 100.0, 88.6, 97.6, 98.9),
        (83.5, 96.0, 98.0, 66.3, 86.5, 91.8),
        "",
    ),
    "vitg": (
        (97.6, 100.0, 100.0, 89.7, 98.1, 98.9),
        (85.4, 97.0, 98.5, 68.3, 87.7, 92.6),
        "Salesforce/blip2-itm-vit-g-coco",
    ),
}
VARIANTS = tuple(PAPER)


def get_config(variant: str = "vitg") -> ConfigDict:
    published.words(variant, tuple(published.VITS))
    config = default()
    config.name = f"retrieval-{variant}"
    flickr, coco, config.model = PAPER[variant]
    config.tasks = ConfigDict(
        {name: task("retrieval", name, "test") for name in ("flickr30k", "coco")}
    )
    names = [f"{way}_r{k}" for way in WAYS for k in (1, 5, 10)]
    config.published.update(
        {
            "table": "5",
            "row": variant,
            "weights": config.model,
            "scores": {
                "flickr30k": dict(zip(names, flickr, strict=True)),
                "coco": dict(zip(names, coco, strict=True)),
            },
        }
    )
    return config
