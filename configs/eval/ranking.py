"""Questions with few possible answers, the likeliest of which is taken (Dai et al. 2023, 2.4).

    blip2 evaluate --config=configs/eval/ranking.py --workdir=DIR --model=SRC \\
        --config.tasks.choices.data.dir=questions.jsonl --config.tasks.choices.data.images=photos
    blip2 evaluate ... --config.tasks.choices.candidates="('yes','no')"

A line of the list: {"image": "1.jpg", "question": "is it a cat?", "answer": "yes",
"choices": ["yes", "no"], "question_id": 1}.
"""

from ml_collections import ConfigDict

from configs.eval.default import get_config as default
from configs.eval.default import task


def get_config() -> ConfigDict:
    config = default()
    config.name = "ranking"
    config.tasks = ConfigDict(
        {"choices": task("ranking", "files", "", "data/choices.jsonl", metric="exact")}
    )
    return config
