"""The three evaluations of the embedded world, and the report.

blip2 evaluate --config=configs/digits/evaluate.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "digits-evaluate"
    config.seed = 0
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
    config.batch_size = 50
    config.retrieval = ConfigDict({"candidates": 100, "rerank": 16})
    # Fields of `inference.decode.Decoding`; greedy, where the published rows take five beams.
    config.captioning = ConfigDict({"decoding": {"num_beams": 1, "max_new_tokens": 30}})
    config.vqa = ConfigDict({"form": "official", "decoding": {"num_beams": 1, "max_new_tokens": 6}})
    config.report = ConfigDict({"examples": 24, "attention": 4})
    return config
