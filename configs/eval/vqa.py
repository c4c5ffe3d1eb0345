"""Zero-shot visual question answering (paper, table 2): VQAv2, OK-VQA and GQA.

    blip2 evaluate --config=configs/eval/vqa.py:vitg-flant5xl --workdir=DIR
    blip2 evaluate --config=configs/eval/vqa.py:vitg-opt2.7b --workdir=DIR --model=runs/stage2

Answers to test-dev are not public: its file in predictions/ is for the evaluation server. Prompts
are the paper's; LAVIS's own files ask OPT with "Short answer:" too. The paper says a length penalty
of -1 for all; LAVIS's code applies it to FlanT5 and 0 to OPT, as this does.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import published
from configs.eval.default import get_config as default
from configs.eval.default import published_decoding, task

# VQAv2 val and test-dev, OK-VQA test, GQA test-dev (paper, table 2); public weights.
PAPER: dict[str, tuple[tuple[float, ...], str]] = {
    "vitl-opt2.7b": ((50.1, 49.7, 30.2, 33.9), ""),
    "vitg-opt2.7b": ((53.5, 52.3, 31.7, 34.6), "Salesforce/blip2-opt-2.7b"),
    "vitg-opt6.7b": ((54.3, 52.6, 36.4, 36.4), "Salesforce/blip2-opt-6.7b"),
    "vitl-flant5xl": ((62.6, 62.3, 39.4, 44.4), "blip2_pretrained_flant5xl_vitL.pth"),
    "vitg-flant5xl": ((63.1, 63.0, 40.7, 44.2), "Salesforce/blip2-flan-t5-xl"),
    "vitg-flant5xxl": ((65.2, 65.0, 45.9, 44.7), "Salesforce/blip2-flan-t5-xxl"),
}
VARIANTS = tuple(PAPER)


def get_config(variant: str = "vitg-flant5xl") -> ConfigDict:
    vit, llm = published.words(variant, tuple(published.VITS), tuple(published.LLMS))
    config = default()
    config.name = f"vqa-{variant}"
    scores, config.model = PAPER.get(variant, ((), ""))
    if config.model.endswith(".pth"):  # LAVIS's, which holds neither tower
        config.vit, config.llm = published.VITS[vit]["source"], published.LLMS[llm]
    short = "Short answer:" if llm.startswith("flant5") else "Answer:"
    options: dict[str, Any] = {
        "prompt": f"Question: {{}} {short}",
        "decoding": published_decoding(llm, "vqa"),
    }
    config.tasks = ConfigDict(
        {
            "vqav2_val": task("vqa", "vqav2", "val", **options),
            "vqav2_test_dev": task("vqa", "vqav2", "test-dev", **options),
            # The paper calls OK-VQA's val2014 its test set.
            "okvqa": task("vqa", "okvqa", "val", lemmatize=True, **options),
            "gqa": task("vqa", "gqa", "testdev_balanced", metric="exact", **options),
        }
    )
    names = ("vqav2_val", "vqav2_test_dev", "okvqa", "gqa")
    config.published.update(
        {
            "table": "2",
            "row": variant,
            "weights": config.model,
            "scores": {n: {"accuracy": x} for n, x in zip(names, scores, strict=False)},
        }
    )
    return config
