"""Fine-tuned visual question answering (paper, table 4): VQAv2's two test splits, for the server.

    blip2 evaluate --config=configs/eval/vqa_finetuned.py:vitg-flant5xl --workdir=DIR \\
        --model=runs/vqa

No weights of these models were published; `configs/finetune_vqa.py` makes them. Five beams and the
prompt are the paper's (table 8); the length penalty is that of its zero-shot evaluation.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import published
from configs.eval.default import get_config as default
from configs.eval.default import published_decoding, task

# test-dev and test-std (paper, table 4).
PAPER = {
    "vitg-flant5xl": (81.55, 81.66),
    "vitg-opt2.7b": (81.59, 81.74),
    "vitg-opt6.7b": (82.19, 82.30),
}
VARIANTS = tuple(PAPER)


def get_config(variant: str = "vitg-flant5xl") -> ConfigDict:
    _, llm = published.words(variant, tuple(published.VITS), tuple(published.LLMS))
    options: dict[str, Any] = {
        "prompt": "Question: {} Answer:",
        "decoding": published_decoding(llm, "vqa"),
    }
    config = default()
    config.name = f"vqa-finetuned-{variant}"
    names = {"vqav2_test_dev": "test-dev", "vqav2_test_std": "test"}
    config.tasks = ConfigDict(
        {name: task("vqa", "vqav2", split, **options) for name, split in names.items()}
    )
    scores = zip(names, PAPER.get(variant, ()), strict=False)
    config.published.update(
        {"table": "4", "row": variant, "scores": {n: {"accuracy": x} for n, x in scores}}
    )
    return config
