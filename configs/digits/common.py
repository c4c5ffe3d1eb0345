"""What the recipes of the embedded world share: small towers, one CPU's worth of everything."""

from ml_collections import ConfigDict

from configs.default import get_config as default


def get_config() -> ConfigDict:
    config = default()
    config.dtype = "float32"  # what CPUs compute fastest
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})

    config.model.vit.source = "package:digits-vit"
    config.model.vit.fingerprint = (
        "e552c06a343ffbe245609c3be9148d7b80801bba390d023bdee104bf0598fce0"
    )
    config.model.llm.source = "package:digits-opt"
    config.model.llm.fingerprint = (
        "7a6238d4a268a288bb506f27a27f22380c1165c0bdfb6dc906177c8679e1a9cd"
    )
    config.model.qformer.update(
        {
            "num_query_tokens": 12,
            "hidden_size": 96,
            "num_layers": 2,
            "num_heads": 4,
            "mlp_dim": 384,
            "vocab_size": 190,
            "bos_token_id": 189,
            "max_position_embeddings": 64,
            "initializer_range": 0.06,  # 0.02 for BERT's width of 768; by its square root, for 96
            "dropout": 0.0,  # thousands of scenes, a few epochs: nothing to overfit yet
        }
    )
    config.model.projection_dim = 64

    config.data.dir = "runs/quickstart/data"
    config.data.qformer_tokenizer = "package:digits-bert"
    config.data.text_length = 28
    config.data.llm_length = 28
    config.data.crop_scale = (1.0, 1.0)  # places are in the captions: no crops
    config.data.flip = False  # nor mirrored digits
    config.data.clean_text = False  # captions are the world's grammar, commas and all
    config.data.threads = 2
    config.data.batch_size = 64

    config.checkpoint.every = 200
    config.log.every = 20
    return config
