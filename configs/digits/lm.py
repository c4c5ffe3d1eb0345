"""The embedded world's language model: an OPT that has read stories and never seen an image.

blip2 train --config=configs/digits/lm.py --workdir=runs/towers/lm
"""

from ml_collections import ConfigDict

from configs.digits.common import get_config as common


def get_config() -> ConfigDict:
    config = common()
    config.name = "digits-lm"
    config.stage.name = "pretrain_lm"
    config.trainable = ("llm",)
    config.model.llm.update(
        {
            "source": "",
            "vocab_size": 208,
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "ffn_dim": 512,
            "max_position_embeddings": 192,
            "dropout": 0.0,
        }
    )
    config.steps = 6000
    config.optim.update({"peak_lr": 1e-3, "end_lr": 1e-6, "warmup_steps": 200, "clip_norm": 1.0})
    config.data.source = "stories"
    config.data.batch_size = 48
    config.data.stories = 6000 * 48
    config.data.llm_tokenizer = "package:digits-opt"
    config.data.llm_length = 128
    config.eval.update({"every": 500, "batches": 5, "batch_size": 100})
    return config
