"""A real run of a few seconds: a language model of one small layer reads the embedded stories."""

from configs.digits.lm_easy import get_config as easy


def get_config():
    config = easy()
    config.name = "tiny-lm"
    config.steps = 40
    config.model.llm.update({"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32})
    config.data.batch_size = 4
    config.data.llm_length = 32
    config.optim.warmup_steps = 2
    config.checkpoint.every = 5
    config.log.every = 2
    return config


def sweep(add):
    for seed in range(4):
        add(seed=seed)
