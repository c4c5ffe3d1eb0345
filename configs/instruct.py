"""Instruction tuning as InstructBLIP does it: the Q-Former reads the instruction too.

    blip2 train --config=configs/instruct.py:vitg-vicuna7b --workdir=DIR \\
        --config.init.checkpoint=runs/stage2

Give your own mixture of data sets with questions; parts are weighed by the root of their size, as
published (Dai et al. 2023, section 2.4).
"""

from ml_collections import ConfigDict

from configs import published

BATCH_SIZE = {"flant5xl": 192, "vicuna7b": 128, "flant5xxl": 64, "vicuna13b": 64}


def get_config(variant: str = "vitg-vicuna7b") -> ConfigDict:
    vit, llm = published.words(variant, tuple(published.VITS), tuple(BATCH_SIZE))
    config = published.get_config(vit, llm)
    config.name = f"instruct-{variant}"
    config.stage.name = "stage2"
    config.trainable = (*published.VISUAL, "language_projection")
    config.model.qformer_reads_prompt = True
    config.init.update({"checkpoint": "runs/stage2", "bert": "google-bert/bert-base-uncased"})
    config.steps = 60_000
    published.small_rates(config)
    config.data.mixture = ConfigDict(
        {
            "vqav2": {"source": "vqav2", "dir": "data/vqav2"},
            "okvqa": {"source": "okvqa", "dir": "data/okvqa"},
            "gqa": {"source": "gqa", "dir": "data/gqa"},
        }
    )
    config.data.mixture_by = "sqrt_size"
    config.data.batch_size = BATCH_SIZE[llm]
    # LAVIS: instructions have 128 tokens and are cut on the left, answers 256.
    config.data.text_length = config.data.max_prompt_length = 128
    config.data.llm_length = 256
    config.data.task = "answer"
    config.data.prompt = "Question: {} Short answer:"
    return config
