"""The embedded world's language model, first part: short stories with few attributes.

    blip2 train --config=configs/digits/lm_easy.py --workdir=runs/towers/lm_easy

An OPT that is trained on text alone. Repeated word lists teach it to attend to earlier tokens, and
repeated descriptions which attribute belongs to which digit; `lm.py` continues with whole stories.
"""

from ml_collections import ConfigDict

from configs.digits.common import get_config as common


def get_config() -> ConfigDict:
    config = common()
    config.name = "digits-lm-easy"
    config.stage.name = "pretrain_lm"
    config.trainable = ("llm",)
    config.model.llm.update(
        {
            "source": "",
            "fingerprint": "",
            "vocab_size": 208,
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "ffn_dim": 512,
            "max_position_embeddings": 192,
            "dropout": 0.0,
            "sinusoid": 0.1,
        }
    )
    config.steps = 3000
    config.optim.update({"peak_lr": 1.5e-3, "end_lr": 3e-4, "warmup_steps": 200, "clip_norm": 1.0})
    config.data.source = "easy_stories"
    config.data.story_warmup = 0.08
    config.data.batch_size = 64
    config.data.llm_tokenizer = "package:digits-opt"
    config.data.llm_length = 64
    config.checkpoint.every = 500
    config.log.every = 50
    return config
