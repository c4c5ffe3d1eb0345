"""Every setting of every published recipe, beside where it is published.

What is expected is written here by hand; nothing is taken from the configs. `ALL` holds for every
recipe, and the rows below change it, each for the recipes that its pattern names.
"""

import fnmatch
import itertools

import pytest

from blip2_jax import cli

VITS = ("vitg", "vitl")
LLMS = ("opt2.7b", "opt6.7b", "flant5xl", "flant5xxl", "vicuna7b", "vicuna13b")
INSTRUCTED = ("flant5xl", "flant5xxl", "vicuna7b", "vicuna13b")

RECIPES = [
    *(f"stage1.py:{'-'.join(p)}" for p in itertools.product(VITS, ("paper", "lavis"))),
    *(f"stage2.py:{'-'.join(p)}" for p in itertools.product(VITS, LLMS, ("paper", "lavis"))),
    *(f"finetune_caption.py:{'-'.join(p)}" for p in itertools.product(VITS, LLMS)),
    *(f"finetune_caption.py:{'-'.join(p)}-lavis" for p in itertools.product(VITS, LLMS)),
    *(f"finetune_retrieval.py:{vit}{lavis}" for vit in VITS for lavis in ("", "-lavis")),
    *(f"finetune_vqa.py:{'-'.join(p)}" for p in itertools.product(VITS, LLMS)),
    *(f"instruct.py:{'-'.join(p)}" for p in itertools.product(VITS, INSTRUCTED)),
]

# Paths below are those of LAVIS: lavis/projects/blip2/train and lavis/models/blip2_models.
ALL = {
    "dtype": "bfloat16",  # ours; the paper: float16, and bfloat16 of FlanT5 (section 3.4)
    "frozen_dtype": "bfloat16",  # the same
    # Optimizer: paper, section 3.4.
    "optim.betas": (0.9, 0.98),
    "optim.weight_decay": 0.05,
    "optim.peak_lr": 1e-4,
    "optim.warmup_steps": 2000,
    "optim.schedule": "per_step",
    "optim.steps_per_epoch": 0,
    "optim.warmup_start_lr": 1e-6,  # pretrain_stage1.yaml, pretrain_stage2.yaml: warmup_lr
    "optim.end_lr": 1e-5,  # the same: min_lr; the paper says nothing for stage 1
    "optim.eps": 1e-8,  # torch's
    "optim.clip_norm": 0.0,  # none in LAVIS's runner_base.py
    "optim.decay_biases": False,  # blip2.py: get_optimizer_params
    "optim.decay_temperature": True,  # the same: it has no dimension
    "optim.vit_layer_decay": 1.0,
    # Losses: paper, section 3.2; blip2_qformer.py.
    "stage.objectives": ("itc", "itm", "itg"),
    "stage.label_smoothing": 0.1,  # blip2_qformer.py, Qformer.py
    "stage.itc_gather_grad": True,
    "stage.use_image_ids": True,
    "stage.accumulate": 1,
    # The model: paper, section 3.1; blip2.py: init_Qformer; blip2_qformer.py.
    "model.qformer.num_query_tokens": 32,
    "model.qformer.hidden_size": 768,
    "model.qformer.num_layers": 12,
    "model.qformer.num_heads": 12,
    "model.qformer.mlp_dim": 3072,
    "model.qformer.cross_attention_frequency": 2,
    "model.qformer.vocab_size": 30523,
    "model.qformer.bos_token_id": 30522,
    "model.qformer.max_position_embeddings": 512,
    "model.qformer.layer_norm_eps": 1e-12,
    "model.qformer.dropout": 0.1,
    "model.qformer.initializer_range": 0.02,
    "model.projection_dim": 256,
    "model.initial_temperature": 0.07,
    "model.ln_vision_eps": 1e-5,
    "model.qformer_reads_prompt": False,
    "model.vit.drop_path": 0.0,  # blip2.py's default; paper, tables 7 to 9
    "model.vit.resolution": 0,  # the encoder's own 224
    "model.llm.dropout": 0.0,
    "model.llm.lora.rank": 0,
    # Data: paper, section 3.4, and LAVIS's blip_processors.py.
    "data.text_length": 32,  # blip2_qformer.py: max_txt_len
    "data.llm_length": 32,  # blip2_opt.py, blip2_t5.py: max_txt_len
    "data.max_prompt_length": 64,  # ours; there is no prompt that long where it is not set
    "data.llm_special_tokens": {},
    "data.prompt": "",
    "data.task": "caption",
    "data.form": "image",
    "data.mixture_by": "weight",
    "data.mismatched": 0.0,
    "data.clean_text": True,
    "data.fold_whitespace": True,  # ours: LAVIS leaves a line end within a caption
    "data.alpha_background": "white",  # ours: LAVIS drops what an image says of transparency
    "data.first_captions": 0,
    "data.crop_scale": (0.5, 1.0),
    "data.flip": True,
    "data.randaugment": (0, 0),
    "data.resize": "exact",
    "init.bert": "",
    "init.checkpoint": "runs/stage2",
}
STAGE1 = ("ln_vision", "query_tokens", "qformer", "vision_proj", "text_proj", "itm_head")
STAGE1 += ("itg_head", "temp")
STAGE2 = ("ln_vision", "query_tokens", "qformer", "language_projection")
WEB = ("coco", "vg", "cc3m", "cc12m", "sbu", "laion")

ROWS = [
    # --------------------------------------------------------------- language models, any recipe
    ("*opt?.7b*", {"end of text": "\n"}),  # blip2_opt.py
    ("*flant5*", {"end of text": "its own"}),  # blip2_t5.py: its tokenizer's </s>
    (
        "*vicuna*",  # blip2_vicuna_instruct.py
        {
            "end of text": "its own",
            "data.llm_special_tokens": {
                "bos_token": "</s>",
                "eos_token": "</s>",
                "unk_token": "</s>",
            },
        },
    ),
    # --------------------------------------------------------------------- paper, section 3.4
    (
        "stage1.py:*",
        {
            "trainable": STAGE1,
            "stage.name": "stage1",
            "steps": 250_000,
            "data.batch_size": 1680,
            "mixture": WEB,
            "data.mixture_by": "size",  # ours: how the sets were mixed is not published
            "init.bert": "google-bert/bert-base-uncased",  # section 3.1
            "init.checkpoint": "",
        },
    ),
    ("stage1.py:vitl-*", {"data.batch_size": 2320}),
    (
        "stage2.py:*",
        {
            "trainable": STAGE2,
            "stage.name": "stage2",
            "steps": 80_000,
            "data.batch_size": 1920,
            "optim.end_lr": 5e-5,
            "mixture": WEB,
            "data.mixture_by": "size",
            "init.checkpoint": "runs/stage1",
        },
    ),
    ("stage2.py:*-flant5*", {"data.batch_size": 1520}),
    # ----------------------------------------------------------- paper, tables 7, 8 and 9
    (
        "finetune_*",
        {
            "optim.peak_lr": 1e-5,
            "optim.warmup_steps": 1000,
            "optim.betas": (0.9, 0.999),
            "optim.warmup_start_lr": 1e-8,  # caption_coco_ft.yaml, retrieval_coco_ft.yaml
            "optim.end_lr": 0.0,  # the same
            "data.form": "caption",
            "mixture": (),
        },
    ),
    (
        "finetune_caption.py:*",  # table 7
        {
            "trainable": ("vit", *STAGE2),
            "stage.name": "stage2",
            "steps": 11_069,  # 5 epochs of 566,747 captions by 256
            "data.batch_size": 256,
            "model.vit.resolution": 364,
            "data.prompt": "a photo of",
        },
    ),
    ("finetune_caption.py:*-opt6.7b", {"optim.vit_layer_decay": 0.95}),
    (
        "finetune_vqa.py:*",  # table 8
        {
            "trainable": ("vit", *STAGE2),
            "stage.name": "stage2",
            "steps": 82_165,  # 5 epochs of 443,757 + 214,354 + 1,445,322 questions by 128
            "data.batch_size": 128,
            "model.vit.resolution": 490,
            "optim.vit_layer_decay": 0.95,
            "model.qformer_reads_prompt": True,  # figure 7
            "data.prompt": "Question: {} Answer:",
            "data.task": "answer",
            "data.form": "image",
            "mixture": ("vqav2", "vg_qa"),  # section 4.3
            "data.mixture_by": "size",  # ours
            "data.text_length": 64,  # ours: the code was not published
            "init.bert": "google-bert/bert-base-uncased",
        },
    ),
    ("finetune_vqa.py:*-opt6.7b", {"optim.vit_layer_decay": 0.9}),
    (
        "finetune_retrieval.py:*",  # table 9
        {
            "trainable": ("vit", *STAGE1),
            "stage.name": "stage1",
            "steps": 12_650,  # 5 epochs of 566,747 captions by 224
            "data.batch_size": 224,
            "model.vit.resolution": 364,
            "optim.vit_layer_decay": 0.95,
            "init.checkpoint": "runs/stage1",
        },
    ),
    (
        "finetune_retrieval.py:vitl",
        {"optim.peak_lr": 5e-6, "optim.betas": (0.9, 0.98), "optim.vit_layer_decay": 1.0},
    ),
    # ------------------------------- InstructBLIP (Dai et al. 2023, implementation details)
    (
        "instruct.py:*",
        {
            "trainable": STAGE2,
            "stage.name": "stage2",
            "steps": 60_000,
            "data.batch_size": 64,
            "optim.peak_lr": 1e-5,
            "optim.warmup_steps": 1000,
            "optim.betas": (0.9, 0.999),
            "optim.warmup_start_lr": 1e-8,
            "optim.end_lr": 0.0,
            "model.qformer_reads_prompt": True,
            "data.text_length": 128,  # blip2_vicuna_instruct.py: max_txt_len
            "data.max_prompt_length": 128,  # the same
            "data.llm_length": 256,  # the same: max_output_txt_len
            "data.task": "answer",
            "data.prompt": "Question: {} Short answer:",
            "mixture": ("vqav2", "okvqa", "gqa"),
            "data.mixture_by": "sqrt_size",  # section 2.4
            "init.bert": "google-bert/bert-base-uncased",
        },
    ),
    ("instruct.py:*-flant5xl", {"data.batch_size": 192}),
    ("instruct.py:*-vicuna7b", {"data.batch_size": 128}),
    # ------------------------------------------------------------------ LAVIS's YAMLs and code
    (
        "*-lavis",
        {
            "optim.betas": (0.9, 0.999),  # runner_base.py: no second beta in any YAML
            "optim.schedule": "per_epoch",  # lavis/common/optims.py
            "optim.vit_layer_decay": 1.0,  # its rates by block are never used
            "stage.itc_gather_grad": False,  # blip2_qformer.py: concat_all_gather
            "model.llm.dropout": 0.1,  # the language model is not put into eval mode
            "data.fold_whitespace": False,  # blip_processors.py: BlipCaptionProcessor
            "data.alpha_background": "drop",  # caption_datasets.py: convert("RGB")
        },
    ),
    (
        "stage?.py:*-lavis",
        {
            "mixture": ("coco", "vg"),
            "data.mixture_by": "size",  # datasets are concatenated
            "data.form": "caption",  # caption_datasets.py, image_text_pair_datasets.py
            "stage.use_image_ids": False,  # image_text_pair_datasets.py gives none
            "optim.end_lr": 1e-5,
        },
    ),
    # Samples of a GPU by its batch, both rounded as torch's sampler and loader round them.
    (
        "stage1.py:*-lavis",  # pretrain_stage1.yaml, on 16 GPUs
        {
            "data.batch_size": 1600,
            "optim.warmup_steps": 5000,
            "optim.steps_per_epoch": 867,  # ceil((566,747 + 821,774) / 16) // 100
            "steps": 8670,
        },
    ),
    (
        "stage2.py:*-lavis",  # pretrain_stage2.yaml
        {"data.batch_size": 1024, "optim.steps_per_epoch": 1355, "steps": 13_550},
    ),
    (
        "finetune_caption.py:*-lavis",  # caption_coco_ft.yaml
        {"optim.steps_per_epoch": 2213, "steps": 11_065},
    ),
    (
        "finetune_retrieval.py:*-lavis",  # retrieval_coco_ft.yaml, whose ViT-L has the same rates
        {"optim.steps_per_epoch": 2530, "steps": 12_650, "optim.peak_lr": 1e-5},
    ),
]

# What decides nothing of what is computed, or has a test of its own.
OPERATION = {
    *(
        "data.columns",
        "data.source",
        "data.dir",
        "data.images",
        "data.index_dir",
        "data.split",
        "data.eval_split",
    ),
    *("data.mixture", "data.qformer_tokenizer", "data.llm_tokenizer", "data.threads"),
    *("data.workers", "data.max_skipped", "data.story_warmup", "stage.labels"),
    *("model.qformer.remat", "data.end_of_text"),  # the latter is looked at by itself
}


def expected(name):
    found = dict(ALL)
    for pattern, values in ROWS:
        if fnmatch.fnmatchcase(name, pattern):
            found |= values
    return found


def plain(value):
    return value.to_dict() if hasattr(value, "to_dict") else value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_is_published(name):
    config = cli.load_config(f"configs/{name}")
    flat = {
        key: plain(value)
        for section in ("optim", "stage", "data", "init", "model.qformer")
        for key, value in _flatten(config, section)
    }
    want = expected(name)
    mixture = want.pop("mixture")
    assert sorted(config.data.mixture) == sorted(mixture)
    llm = config.model.llm.source
    if llm:
        own = "\n" if "opt" in llm else "its own"
        assert want.pop("end of text") == (flat["data.end_of_text"] or own)
    for key, value in want.items():
        got = flat.pop(key) if key in flat else plain(_at(config, key))
        assert got == value, key
    missing = flat.keys() - OPERATION
    assert not missing, f"write what is published, or that it is ours: {', '.join(missing)}"


def _at(config, path):
    for name in path.split("."):
        config = config[name]
    return config


def _flatten(config, path):
    return [(f"{path}.{key}", value) for key, value in _at(config, path).items()]


@pytest.mark.parametrize("name", ["stage1.py:vitg-lavis", "stage2.py:vitl-opt6.7b-lavis"])
def test_the_parts_of_lavis_pretraining_are_its_own(name):
    """COCO as it is, Visual Genome's captions with RandAugment(2, 5): both YAMLs."""
    mixture = cli.load_config(f"configs/{name}").data.mixture
    assert mixture.coco.to_dict() == {"source": "coco", "dir": "data/coco"}
    assert mixture.vg.randaugment == (2, 5)
    assert mixture.vg.dir.endswith("vg_caption.json") and mixture.vg.source == "files"
