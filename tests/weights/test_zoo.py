"""Every public checkpoint's names, shapes and parameter counts, on abstract models: no weights.

Configs are in the hub's form, which leaves out what is the class's default; one of them is stored
as it is there (`hub/`). Counts are those of the published files, and of LAVIS's training logs.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.llama import LlamaConfig
from blip2_jax.models.opt import OPTConfig
from blip2_jax.models.t5 import T5Config
from blip2_jax.weights import checkpoint, configs, huggingface, lavis, transfer

STORED = json.loads((Path(__file__).parent / "hub/blip2-opt-2.7b.json").read_text())


def opt(width, ffn):
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": ffn}
    return {**STORED["text_config"], **sizes}


def t5(width, ffn, heads):
    return {
        "model_type": "t5", "d_model": width, "d_ff": ffn, "num_heads": heads, "num_layers": 24,
        "num_decoder_layers": 24, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu",
        "is_gated_act": True, "tie_word_embeddings": False, "bos_token_id": 1,
        "decoder_start_token_id": 0,
    }  # fmt: skip


def vicuna(**sizes):
    return {"model_type": "llama", "vocab_size": 32064, **sizes}


VICUNA_13B = vicuna(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
OPT_2B, OPT_6B = opt(2560, 10240), opt(4096, 16384)
T5_XL, T5_XXL = t5(2048, 5120, 32), t5(4096, 10240, 64)
AT_364 = (677 - 257) * 1408  # more position embeddings

# name: (architecture, language model, image size, parameters in the published file)
HUB = {
    "blip2-opt-2.7b": (configs.GENERATION, OPT_2B, 224, 3_744_761_856),
    "blip2-opt-2.7b-coco": (configs.GENERATION, OPT_2B, 364, 3_744_761_856 + AT_364),
    "blip2-opt-6.7b": (configs.GENERATION, OPT_6B, 224, 7_752_869_376),
    "blip2-opt-6.7b-coco": (configs.GENERATION, OPT_6B, 364, 7_752_869_376 + AT_364),
    "blip2-flan-t5-xl": (configs.GENERATION, T5_XL, 224, 3_942_446_592),
    "blip2-flan-t5-xl-coco": (configs.GENERATION, T5_XL, 364, 3_942_446_592 + AT_364),
    "blip2-flan-t5-xxl": (configs.GENERATION, T5_XXL, 224, 12_229_596_672),
    "blip2-itm-vit-g": (configs.RETRIEVAL, None, 224, 1_172_032_258),
    "blip2-itm-vit-g-coco": (configs.RETRIEVAL, None, 364, 1_172_032_258 + AT_364),
    "instructblip-flan-t5-xl": (configs.INSTRUCT, T5_XL, 224, 4_022_969_088),
    "instructblip-flan-t5-xxl": (configs.INSTRUCT, T5_XXL, 224, 12_310_119_168),
    "instructblip-vicuna-7b": (
        configs.INSTRUCT, vicuna(), 224, 7_913_726_720,
    ),
    "instructblip-vicuna-13b": (
        configs.INSTRUCT, VICUNA_13B, 224, 14_192_093_952,
    ),
}  # fmt: skip


class Headers:
    """The names and shapes of a file that nobody wrote."""

    def __init__(self, state_dict):
        self.source = "meta"
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))


def count(tree, *keys):
    leaves = transfer.leaves_of(tree)
    return sum(x.size for p, x in leaves.items() if not keys or p.split("/")[0] in keys)


@pytest.mark.parametrize("name", HUB)
def test_a_public_checkpoint_has_our_names_shapes_and_count(name):
    kind, text, size, published = HUB[name]
    instruct, matching = kind == configs.INSTRUCT, kind == configs.RETRIEVAL
    qformer = {"vocab_size": 30523} if instruct or matching else {}
    document = {
        **{key: STORED[key] for key in ("num_query_tokens", "image_text_hidden_size")},
        "architectures": [kind],
        "model_type": "instructblip" if instruct else "blip-2",
        "vision_config": {} if size == 224 else {"image_size": size},
        "qformer_config": qformer | ({"use_qformer_text_input": True} if matching else {}),
        "text_config": text or {"model_type": "opt"},
    }
    if name == "blip2-opt-2.7b":
        document = STORED
    config = configs.parse_blip2(document, name)
    of = transformers.InstructBlipConfig if instruct else transformers.Blip2Config
    with torch.device("meta"):
        theirs = getattr(transformers, kind)(of(**document))
    abstract = checkpoint.abstract_params(config)
    if matching:
        abstract = {k: v for k, v in abstract.items() if k not in checkpoint.OPTIONAL}
    planned = transfer.plan(huggingface.blip2_table(config), abstract, Headers(theirs.state_dict()))
    assert not [n for n in planned.left_out if "position_ids" not in n]
    # Their fused bias of q, k and v holds zeros for k, which we have no parameter for.
    zeros = config.vit.num_layers * config.vit.hidden_size
    assert count(abstract) + zeros == published


@pytest.mark.parametrize(
    ("document", "ours"),
    [
        (OPT_2B | {"vocab_size": 50272}, OPTConfig()),  # without BLIP-2's padding
        (T5_XL, T5Config()),
        (vicuna(vocab_size=32000), LlamaConfig()),
    ],
    ids=lambda x: x.get("model_type") if isinstance(x, dict) else "",
)
def test_sizes_by_default_are_those_of_the_published_model(document, ours):
    """OPT-2.7B, FlanT5-XL and Vicuna-7B, as their config.json is read."""
    sizes = configs.parse(document, configs.LLMS, "hub")
    assert {**vars(sizes), "eos_token_ids": ()} == {**vars(ours), "eos_token_ids": ()}


LAVIS_LLMS = {
    "opt2.7b": OPTConfig(),
    "opt6.7b": OPTConfig(hidden_size=4096, ffn_dim=16384),
    "flant5xl": T5Config(),
    "flant5xxl": T5Config(hidden_size=4096, mlp_dim=10240, num_heads=64),
}
LN = "ln_vision"
STAGE1 = (LN, "query_tokens", "qformer", "vision_proj", "text_proj", "itm_head", "itg_head", "temp")
STAGE2 = (LN, "query_tokens", "qformer", "language_projection")


@pytest.mark.parametrize(
    ("vit", "llm", "trained", "size", "published"),
    [
        ("g", None, STAGE1, 224, 186_705_470),
        ("L", None, STAGE1, 224, 183_165_758),
        ("g", "opt2.7b", STAGE2, 224, 107_133_696),
        ("g", "opt6.7b", STAGE2, 224, 108_314_880),
        ("g", "flant5xxl", STAGE2, 224, 108_314_880),
        ("g", "flant5xl", STAGE2, 224, 106_739_968),
        ("L", "opt2.7b", STAGE2, 224, 103_593_984),
        ("L", "flant5xl", STAGE2, 224, 103_200_256),
        ("g", "opt2.7b", ("vit", *STAGE2), 364, 1_093_619_584),
        ("g", None, ("vit", *STAGE1), 364, 1_173_191_358),
        ("L", None, ("vit", *STAGE1), 364, 474_177_342),
        ("g", None, ("vit",), 224, 985_894_528),
        ("g", None, ("vit",), 490, 987_258_880),
        ("L", None, ("vit",), 224, 290_581_504),
    ],
)
def test_trainable_parameters_are_those_of_lavis(vit, llm, trained, size, published):
    encoder = {"g": lavis.EVA_G, "L": lavis.CLIP_L}[vit]
    encoder = dataclasses.replace(encoder, image_size=size)
    qformer = dataclasses.replace(Blip2Config().qformer, encoder_width=encoder.hidden_size)
    config = Blip2Config(vit=encoder, qformer=qformer, llm=LAVIS_LLMS.get(llm))
    assert count(checkpoint.abstract_params(config), *trained) == published


@pytest.mark.parametrize("encoder", [lavis.EVA_G, lavis.CLIP_L], ids=["eva_g", "clip_L"])
def test_a_lavis_file_is_understood_from_its_shapes(encoder):
    """Written and recognized at full size, on shapes alone: config in, config out."""
    for llm in (None, *LAVIS_LLMS.values()):
        qformer = dataclasses.replace(Blip2Config().qformer, encoder_width=encoder.hidden_size)
        config = Blip2Config(vit=encoder, qformer=qformer, llm=llm)
        abstract = checkpoint.abstract_params(config)
        leaves = transfer.leaves_of(abstract)
        table = lavis.table(config, lavis.head_name(config))
        shapes = {}
        for row in table.rows:
            if all(p in leaves for p in row.ours if p is not None):
                first = leaves[next(p for p in row.ours if p is not None)]
                kinds = transfer._stored_shapes(row, leaves)
                whole = (sum(s[0] for s in kinds), *kinds[0][1:]) if len(kinds) > 1 else kinds[0]
                shapes |= dict.fromkeys(transfer._names(row, first), whole)
        tensors = type("File", (), {"source": "shapes", "shapes": shapes})
        assert lavis.blip2_config(tensors, llm, None) == config
